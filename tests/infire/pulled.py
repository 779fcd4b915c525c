"""What is in a pulled folder, and what is beside it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from infire.pull import MANIFEST, Manifest

NAMES = [
    "README.md",
    "config.json",
    MANIFEST,
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def manifest(folder: Path) -> Manifest:
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def beside(into: Path) -> list[str]:
    """What a pull left beside the folder; the lock's file stays."""
    if not into.parent.exists():
        return []
    return [name for name in names(into.parent) if name not in (into.name, f".{into.name}.lock")]
