"""A model folder with a tokenizer and no weights, for an engine that only sleeps.

Byte level, like those of most models today: 256 ids for bytes, then made-up words of a few
letters, some of them not ASCII. Words are no merges, so a prompt takes an id a byte.
"""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

CONTEXT_WINDOW = 8192  # tokens
NUM_WORDS = 8192
FIRST_WORD, END_ID = 256, 256 + NUM_WORDS
VOCABULARY = END_ID + 1
_END = "<|im_end|>"
_SPACE = "\u0120"  # how byte-level tokenizers write the byte 0x20
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "le", "mi", "no", "ra", "su", "te", "ver", "tion")
_ACCENTED = "\u00c3\u00a9"  # the two bytes of U+00E9
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}@{% endif %}"
)


def make_model(folder: Path) -> Path:
    """Write the folder, which a worker reads as it reads any model's; returns it."""
    folder.mkdir(parents=True)
    files: dict[str, Any] = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {"chat_template": _TEMPLATE, "eos_token": _END},
        "config.json": {"max_position_embeddings": CONTEXT_WINDOW, "eos_token_id": END_ID},
    }
    encoded = {name: msgspec.json.encode(content) for name, content in files.items()}
    digests = {name: sha256(content).hexdigest() for name, content in encoded.items()}
    about = {
        "source": "path:sleeping",
        "model_digest": digests["config.json"],
        "files": digests,
        "sizes": {name: len(content) for name, content in encoded.items()},
    }
    for name, content in (encoded | {"edgefire.json": msgspec.json.encode(about)}).items():
        (folder / name).write_bytes(content)
    return folder


def _tokenizer() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_ID,
                "content": _END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": False},
        "post_processor": None,
        "decoder": level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": _vocabulary(), "merges": []},
    }


def _vocabulary() -> dict[str, int]:
    """Token -> id: the alphabet of bytes, then words."""
    tokens = dict.fromkeys(_alphabet())
    chance = random.Random(3)
    while len(tokens) < END_ID:
        word = _SPACE + "".join(chance.choices(_SYLLABLES, k=chance.choice((1, 2, 2, 3, 4))))
        tokens[word + _ACCENTED if chance.random() < 0.05 else word] = None
    return {token: token_id for token_id, token in enumerate(tokens)}


def _alphabet() -> list[str]:
    """GPT-2's: printable bytes as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
