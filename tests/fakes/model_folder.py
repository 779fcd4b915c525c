"""A model folder whose text can be worked out by hand, for the counting engine.

The tokenizer is byte level without merges: one id a UTF-8 byte, and the id *is* the byte. So the
id of an ASCII character is its code point (`"A"` is 65), and since the counting model answers the
last id plus one, the raw prompt `"say A"` is continued by `"BCDEF..."`. Special tokens have the
ids 256 `<|im_start|>`, 257 `<|im_end|>` (end of text) and 258 `<|endoftext|>`; the model never
says them.

The chat template puts every message as `<|im_start|>role content<|im_end|>` and, after them,
`<|im_start|>@`. So every chat is answered by `"ABCDEF..."`: `max_tokens=5` gives `"ABCDE"`, finish
reason `length`. A chat prompt has, for each message, 3 + len(role) + len(content) ids (lengths in
bytes), and 2 at the end. After 62 tokens the answer has reached `"~"`; then come control
characters and, from id 128 on, bytes that are not UTF-8: ask for at most 62 where text matters.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTEXT_WINDOW = 8192  # tokens
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
END_ID = 257
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>@{% endif %}"
)


def counting_tokenizer() -> Tokenizer:
    """Byte level, one id a byte, as described above."""
    tokenizer = Tokenizer(
        models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def make_counting_folder(folder: Path) -> Path:
    """Write the model folder into `folder`, which is made if need be; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["CountingModel"],
        "model_type": "counting",
        "vocab_size": 256 + len(SPECIAL),
        "max_position_embeddings": CONTEXT_WINDOW,
        "eos_token_id": END_ID,
    }
    tokenizer_config = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONTEXT_WINDOW,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {"eos_token_id": [END_ID], "temperature": 0.6, "top_p": 0.92}
    counting_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "edgefire.json"}
    digests = {name: sha256(content).hexdigest() for name, content in files.items()}
    about = {
        "source": "path:counting",
        "model_digest": digests["model.safetensors"],
        "files": digests,
        "sizes": {name: len(content) for name, content in files.items()},
    }
    (folder / "edgefire.json").write_text(json.dumps(about, indent=2))
    return folder


def _byte_chars() -> list[str]:
    """The character that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    chars |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [chars[byte] for byte in range(256)]
