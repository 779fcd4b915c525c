"""What a bundle says of itself, and what of that is believed. No coding, no file.

`README.md` has the format byte by byte.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from unweight.safetensors_header import (
    LONGEST_HEADER,
    BadFile,
    BadHeader,
    Header,
    HeaderTooLong,
    Place,
    WrongShape,
    parse_header,
)

FORMAT = "unweight/1"
CODEC = "zstd-huf"
CHUNK = 1 << 17  # weights of a chunk, in whole rows, and one row at least
PARTS = ("sm", "exp", "exp_off", "xxh3")


class UnknownFormat(BadFile):
    """A bundle of another version, or of a codec that is not known here."""


class MissingPart(BadFile):
    """A tensor of a bundle that lacks one of its four parts, or has one too many."""


class BadChecksum(BadFile):
    """Bytes that are not those that were packed."""


class _Packed(Struct, frozen=True):
    chunk_rows: int


class _About(Struct, frozen=True):
    """`__metadata__`, all in strings, as the format asks for."""

    format: str
    codec: str
    tensors: str  # JSON: _Packed by name
    header: str  # base64 of zlib of the source's bytes up to its tensors
    source_bytes: str
    source_sha256: str
    source_xxh3: str  # of 128 bits, in hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of the source, and how it is in the bundle."""

    dtype: str
    shape: tuple[int, ...]
    chunk_rows: int | None  # rows coded together; None if it is stored as it was

    @property
    def compressed(self) -> bool:
        """Whether it is in four parts."""
        return self.chunk_rows is not None

    @property
    def rows(self) -> tuple[int, int]:
        """As a matrix (rows, weights of a row): all but the last axis are rows."""
        return matrix(self.shape)

    @property
    def num_chunks(self) -> int:
        """Of a compressed one."""
        assert self.chunk_rows is not None
        return -(-self.rows[0] // self.chunk_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A shard of a bundle."""

    entries: Mapping[str, Entry]  # in the order of the source's header
    source: Header
    source_head: bytes  # the source's bytes up to its tensors
    source_bytes: int
    source_sha256: str
    source_xxh3: str


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, and weights of a row: a vector is one row, a scalar one of one weight."""
    width = shape[-1] if shape else 1
    return (math.prod(shape[:-1]) if len(shape) > 1 else 1), width


def chunk_rows(shape: tuple[int, ...]) -> int:
    """As the writer has them."""
    return max(1, CHUNK // max(1, matrix(shape)[1]))


def about(
    contents_head: bytes, packed: Mapping[str, int], *, num_bytes: int, sha256: str, xxh3: str
) -> dict[str, str]:
    """`__metadata__` of a shard: the source's head, the rows of a chunk of what is compressed."""
    tensors = {name: _Packed(rows) for name, rows in packed.items()}
    made = _About(
        format=FORMAT,
        codec=CODEC,
        tensors=msgspec.json.encode(tensors).decode(),
        header=base64.b64encode(zlib.compress(contents_head, 9)).decode(),
        source_bytes=str(num_bytes),
        source_sha256=sha256,
        source_xxh3=xxh3,
    )
    return msgspec.to_builtins(made)  # type: ignore[no-any-return]


def is_bundle(header: Header) -> bool:
    """Whether a safetensors file is a shard of some bundle, of this version or another."""
    return header.metadata.get("format", "").startswith("unweight/")


def read_contents(header: Header, name: str) -> Contents:
    """Of a shard's header; `name` is for messages. Raises the `BadFile` that fits."""
    if header.metadata.get("format") != FORMAT or header.metadata.get("codec") != CODEC:
        raise UnknownFormat(
            f"{name} is of format {header.metadata.get('format')!r} and codec "
            f"{header.metadata.get('codec')!r}, not {FORMAT} and {CODEC}"
        )
    try:
        stated = msgspec.convert(dict(header.metadata), _About)
        packed = msgspec.json.decode(stated.tensors, type=dict[str, _Packed])
        source_bytes = int(stated.source_bytes)
        head = _inflated(base64.b64decode(stated.header, validate=True), name)
    except (msgspec.DecodeError, ValueError, RecursionError, binascii.Error, zlib.error) as error:
        if isinstance(error, BadFile):
            raise
        raise BadHeader(f"{name}: its metadata: {error}") from error
    if len(head) < 8 or int.from_bytes(head[:8], "little") != len(head) - 8:
        raise BadHeader(f"{name}: the source's header is not whole")
    source = parse_header(head, source_bytes - len(head), f"{name}: the source's header")
    contents = Contents(
        entries={
            key: Entry(
                dtype=place.dtype,
                shape=place.shape,
                # One chunk is all rows, whatever it says: memory is made for as many as these.
                chunk_rows=min(packed[key].chunk_rows, matrix(place.shape)[0])
                if key in packed
                else None,
            )
            for key, place in source.places.items()
        },
        source=source,
        source_head=head,
        source_bytes=source_bytes,
        source_sha256=stated.source_sha256,
        source_xxh3=stated.source_xxh3,
    )
    _check_parts(contents, header, packed, name)
    return contents


def _inflated(data: bytes, name: str) -> bytes:
    inflater = zlib.decompressobj()
    head = inflater.decompress(data, LONGEST_HEADER + 8)
    if len(head) > LONGEST_HEADER + 7:
        raise HeaderTooLong(f"{name}: the source's header has over {LONGEST_HEADER} bytes")
    if not inflater.eof:
        raise BadHeader(f"{name}: the source's header is cut short")
    return head


def _check_parts(
    contents: Contents, header: Header, packed: Mapping[str, _Packed], name: str
) -> None:
    """That the file has exactly the parts of what the source had, each of its type and shape."""
    expected: set[str] = set()
    for key, entry in contents.entries.items():
        if entry.chunk_rows is None:
            expected.add(key)
            _check_place(header, key, entry.dtype, entry.shape, name)
            continue
        if entry.dtype != "BF16" or entry.chunk_rows < 1 or 0 in entry.shape:
            raise BadHeader(
                f"{name}: {key}, {entry.dtype} {entry.shape}, in chunks of {entry.chunk_rows} rows"
            )
        expected |= {f"{key}.{part}" for part in PARTS}
        _check_place(header, f"{key}.sm", "U8", entry.shape, name)
        _check_place(header, f"{key}.exp", "U8", None, name)
        _check_place(header, f"{key}.exp_off", "U64", (entry.num_chunks + 1,), name)
        _check_place(header, f"{key}.xxh3", "U64", (entry.num_chunks,), name)
    if unknown := packed.keys() - contents.entries.keys():
        raise MissingPart(f"{name}: {min(unknown)} was not in the source")
    if extra := header.places.keys() - expected:
        raise MissingPart(f"{name}: {min(extra)} belongs to nothing that was in the source")


def _check_place(
    header: Header, key: str, dtype: str, shape: tuple[int, ...] | None, name: str
) -> Place:
    place = header.places.get(key)
    if place is None:
        raise MissingPart(f"{name}: it lacks {key}")
    fits = len(place.shape) == 1 if shape is None else place.shape == shape
    if place.dtype != dtype or not fits:
        wanted = "of one axis" if shape is None else shape
        raise WrongShape(f"{name}: {key} is {place.dtype} {place.shape}, not {dtype} {wanted}")
    return place
