"""Small safetensors files and bundles, and hands that spoil them."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from unweight.samples import trained_like
from unweight.writer import pack_folder

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name: type, shape, content
Change = Callable[[dict[str, Any], bytearray], None]  # of a header and the tensors
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


def source(path: Path, *, rows: int = 300) -> bytes:
    """A file of a matrix (in three chunks), a vector too small to code, and whole numbers."""
    tensors = {
        MATRIX: bf16(trained_like(rows, 1024, seed=1)),
        SMALL: bf16(trained_like(1, 1024, seed=2)[0]),
        RAW: ("I64", (5,), bytes(range(40))),
    }
    content = file_of(tensors, metadata={"format": "pt"})
    path.write_bytes(content)
    return content


def bundle(folder: Path, *, rows: int = 300) -> Path:
    """Of `source`, beside it."""
    source(folder / "plain.safetensors", rows=rows)
    pack_folder(folder / "plain.safetensors", folder / "bundle.safetensors", threads=1)
    return folder / "bundle.safetensors"


def by_hand(
    tensors: Tensors,
    rows: Mapping[str, int],
    coded: Callable[[bytes], bytes] = zstandard.compress,
) -> bytes:
    """A bundle of `file_of(tensors)` by what README.md says, and nothing of what packs: of those of
    `rows` so many rows a chunk."""
    plain = file_of(tensors)
    parts: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, (dtype, shape, content) in tensors.items():
        if name not in rows:
            parts[name] = (dtype, shape, content)
            continue
        words = np.frombuffer(content, "<u2").reshape(-1, shape[-1])
        chunks = [words[n : n + rows[name]] for n in range(0, len(words), rows[name])]
        frames = [coded((chunk >> 7 & 0xFF).astype(np.uint8).tobytes()) for chunk in chunks]
        ends = np.cumsum([0, *map(len, frames)])
        digests = [xxhash.xxh3_64_intdigest(chunk.tobytes()) for chunk in chunks]
        sm = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
        parts[f"{name}.sm"] = ("U8", shape, sm.tobytes())
        parts[f"{name}.exp"] = ("U8", (int(ends[-1]),), b"".join(frames))
        parts[f"{name}.exp_off"] = ("U64", (len(ends),), ends.astype("<u8").tobytes())
        parts[f"{name}.xxh3"] = ("U64", (len(chunks),), np.array(digests, "<u8").tobytes())
    about = {
        "format": "unweight/1",
        "codec": "zstd-huf",
        "tensors": json.dumps({name: {"chunk_rows": some} for name, some in rows.items()}),
        "header": deflated(plain[: 8 + int.from_bytes(plain[:8], "little")]),
        "source_bytes": str(len(plain)),
        "source_sha256": hashlib.sha256(plain).hexdigest(),
        "source_xxh3": xxhash.xxh3_128_hexdigest(plain),
    }
    return file_of(parts, metadata=about)


def deflated(head: bytes) -> str:
    """A source's header, as the metadata has it."""
    return base64.b64encode(zlib.compress(head)).decode()


def inflated(text: str) -> bytes:
    """The other way."""
    return zlib.decompress(base64.b64decode(text))


def spoil(path: Path, change: Change) -> None:
    """Change the header and the tensors of a file."""
    head, data = taken_apart(path.read_bytes())
    changed = bytearray(data)
    change(head, changed)
    path.write_bytes(with_header(head, bytes(changed)))


def tensors_of(head: Mapping[str, Any]) -> dict[str, Any]:
    """What `__metadata__` says of compressed tensors."""
    found: dict[str, Any] = json.loads(head["__metadata__"]["tensors"])
    return found


def within(head: Mapping[str, Any], data: bytes, key: str) -> bytes:
    """The bytes of one tensor of a file."""
    begin, end = head[key]["data_offsets"]
    return bytes(data[begin:end])


def named_twice(pairs: Iterable[tuple[str, object]]) -> bytes:
    """JSON of an object, its names as they come."""
    return b"{%s}" % b", ".join(f"{json.dumps(k)}: {json.dumps(v)}".encode() for k, v in pairs)


def left_in(folder: Path) -> list[str]:
    """What is in a folder, hidden or not; nothing if it is not there."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
