"""What the default model is asked in the parity tests: 21 prompts, from 1 to 1,000 tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

_SHORT = (
    "Once",
    "The capital of Peru is",
    "1, 2, 3, 4, 5,",
    "Q: What is the boiling point of water at sea level?\nA:",
    "Dear Professor,\n\nI am writing to you because",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou answer in one sentence.<|im_end|>\n"
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)
_CODE = (
    "def fibonacci(n):\n    ",
    '#include <stdio.h>\n\nint main(void) {\n    printf("',
    "SELECT name, COUNT(*) FROM orders WHERE",
    "<!DOCTYPE html>\n<html>\n<head>\n  <title>",
    'import torch\n\nclass Attention(torch.nn.Module):\n    """Multi-head attention."""\n\n',
)
_UNICODE = (
    "Der Fluss fließt durch die Stadt, und am Ufer",
    "Les élèves étaient déjà là lorsque",
    "東京は日本の首都であり、",
    "Москва — столица России, и",
    "🙂🙃 emoji, naïve café, Ελληνικά, עברית, العربية, हिन्दी:",
)
_STORY = (
    "In the valley there were {n} houses, and in house number {n} lived a clockmaker who had "
    "repaired {n} clocks, of which only {n} still told the time. "
)
_CODE_LINE = "value_{n} = compute(value_{n}, step={n})  # adds {n}\n"
_TABLE_LINE = "| {n} | région {n} | {n} € | température: {n} °C |\n"


def prompts(folder: Path) -> dict[str, list[int]]:
    """Token ids by a name that says what they are."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def long(line: str, length: int) -> list[int]:
        return ids("".join(line.format(n=n) for n in range(1, 200)))[:length]

    named = {f"short {n}": ids(text) for n, text in enumerate(_SHORT)}
    named |= {f"code {n}": ids(text) for n, text in enumerate(_CODE)}
    named |= {f"unicode {n}": ids(text) for n, text in enumerate(_UNICODE)}
    named |= {
        "1,000 tokens of prose": long(_STORY, 1000),
        "1,000 tokens of code": long(_CODE_LINE, 1000),
        "1,000 tokens of a table": long(_TABLE_LINE, 1000),
        "300 tokens of prose": long(_STORY, 300),
    }
    return named
