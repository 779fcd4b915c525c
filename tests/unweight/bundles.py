"""Small safetensors files and bundles, and hands that spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unweight.samples import trained_like
from unweight.writer import pack_folder

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name: type, shape, content
MATRIX, SMALL, RAW = "a.weight", "norm.weight", "ids"


def file_of(
    tensors: Tensors, *, metadata: Mapping[str, str] | None = None, spaces: int = 0
) -> bytes:
    """A safetensors file, tensors as they come."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    end = 0
    for name, (dtype, shape, content) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    return with_header(head, b"".join(content for _, _, content in tensors.values()), spaces)


def with_header(head: Mapping[str, Any] | bytes, data: bytes, spaces: int = 0) -> bytes:
    """A file of that header, whatever it says."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * spaces
    return len(text).to_bytes(8, "little") + text + data


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def bf16(bits: NDArray[np.uint16]) -> tuple[str, tuple[int, ...], bytes]:
    """For `file_of`."""
    return "BF16", bits.shape, bits.astype("<u2").tobytes()


def source(path: Path) -> bytes:
    """A file of a matrix in three chunks, a vector that is too small to code, and whole numbers."""
    tensors = {
        MATRIX: bf16(trained_like(300, 1024, seed=1)),
        SMALL: bf16(trained_like(1, 1024, seed=2)[0]),
        RAW: ("I64", (5,), bytes(range(40))),
    }
    content = file_of(tensors, metadata={"format": "pt"})
    path.write_bytes(content)
    return content


def bundle(folder: Path) -> Path:
    """Of `source`, beside it."""
    source(folder / "plain.safetensors")
    pack_folder(folder / "plain.safetensors", folder / "bundle.safetensors", threads=1)
    return folder / "bundle.safetensors"


def spoil(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Change the header and the tensors of a file."""
    head, data = taken_apart(path.read_bytes())
    changed = bytearray(data)
    change(head, changed)
    path.write_bytes(with_header(head, bytes(changed)))


def tensors_of(head: Mapping[str, Any]) -> dict[str, Any]:
    """What `__metadata__` says of compressed tensors."""
    found: dict[str, Any] = json.loads(head["__metadata__"]["tensors"])
    return found
