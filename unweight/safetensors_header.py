"""The header of a safetensors file: read with nothing believed, and written. Knows no bundle.

The format: https://huggingface.co/docs/safetensors. Eight bytes of length, JSON of what lies where,
then the tensors without gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

LONGEST_HEADER = 100_000_000  # bytes, as the format's own reader has it
BITS = {  # of one element of every type that the format has
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_MAX_ELEMENTS = 1 << 62
_TOLD = 100  # characters of what may be a header long


class BadFile(ValueError):
    """A file that is no whole safetensors file, or no whole bundle. The message says where."""


class Truncated(BadFile):
    """It ends before what its header says."""


class HeaderTooLong(BadFile):
    """The header is longer than any reader takes."""


class BadHeader(BadFile):
    """The header is no JSON of tensors."""


class WrongOffsets(BadFile):
    """A tensor that ends before it begins, lies outside the file, or leaves a gap."""


class Overlapping(BadFile):
    """Two tensors in the same bytes."""


class WrongShape(BadFile):
    """A tensor whose shape and type ask for other bytes than it has."""


class _Name(str):
    """A name in an object that has each of them once: to be decoded with `_once`."""

    __slots__ = ()


class _Entry(Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. Tensors are in the order of their bytes."""

    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    num_bytes: int  # with the eight of the length: where the tensors begin
    data_bytes: int  # of all tensors


def read_header(content: NDArray[np.uint8], name: str) -> Header:
    """Of a whole file, mapped; `name` is for messages. Raises the `BadFile` that fits."""
    if content.size < 8:
        raise Truncated(f"{name}: {content.size} bytes are no safetensors file")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > LONGEST_HEADER:
        raise HeaderTooLong(f"{name}: a header of {length} bytes, at most {LONGEST_HEADER}")
    if 8 + length > content.size:
        raise Truncated(f"{name}: a header of {length} bytes in {content.size}")
    return parse_header(content[: 8 + length].tobytes(), content.size - 8 - length, name)


def parse_header(head: bytes, data_bytes: int, name: str) -> Header:
    """Of the bytes up to the tensors, in a file with so many bytes of tensors."""
    try:
        raw = msgspec.json.decode(head[8:], type=dict[_Name, msgspec.Raw], dec_hook=_once())
        about = raw.pop(_Name("__metadata__"), b"{}")
        stated = msgspec.json.decode(about, type=dict[_Name, str], dec_hook=_once())
        metadata = {str(key): value for key, value in stated.items()}
        entries = {str(key): msgspec.json.decode(entry, type=_Entry) for key, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadHeader(f"{name}: {error}") from error
    places = {key: _place(key, entry, data_bytes, name) for key, entry in entries.items()}
    ordered = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_no_gaps(ordered, data_bytes, name)
    return Header(ordered, metadata, len(head), data_bytes)


def write_header(places: Mapping[str, Place], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The bytes up to the tensors: at least `room`, and a multiple of 8."""
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    content |= {
        key: {
            "dtype": place.dtype,
            "shape": place.shape,
            "data_offsets": (place.begin, place.end),
        }
        for key, place in places.items()
    }
    text = msgspec.json.encode(content)
    padded = text.ljust(max(-(-len(text) // 8) * 8, room - 8), b" ")
    return len(padded).to_bytes(8, "little") + padded


def _once() -> Callable[[type, Any], _Name]:
    """For one object: where it has a name twice, JSON is read as if only the last were there."""
    seen: set[str] = set()

    def name(_: type, key: str) -> _Name:
        if key in seen:
            raise ValueError(f"{key} twice")  # of msgspec's errors it becomes one
        seen.add(key)
        return _Name(key)

    return name


def _num_elements(shape: tuple[int, ...]) -> int:
    """No further than where there are too many: the whole product of a long header takes hours."""
    product = 1
    for size in shape:
        product *= size
        if not 0 <= product <= _MAX_ELEMENTS:
            break
    return product


def _place(key: str, entry: _Entry, data_bytes: int, name: str) -> Place:
    begin, end = entry.data_offsets
    if not 0 <= begin <= end:
        raise WrongOffsets(f"{name}: {key} from {begin} to {end}")
    if end > data_bytes:
        raise Truncated(f"{name}: {key} ends at {end} of {data_bytes} bytes")
    if entry.dtype not in BITS:
        raise BadHeader(f"{name}: {key} is of type {entry.dtype}, which the format has not")
    num_elements = _num_elements(entry.shape)
    if not all(0 <= n <= _MAX_ELEMENTS for n in (num_elements, *entry.shape)):
        raise WrongShape(f"{name}: {key} is {str(entry.shape)[:_TOLD]}, more than there can be")
    if num_elements * BITS[entry.dtype] != 8 * (end - begin):
        raise WrongShape(f"{name}: {key}, {entry.dtype} {entry.shape}, has {end - begin} bytes")
    return Place(entry.dtype, entry.shape, begin, end)


def _check_no_gaps(places: Mapping[str, Place], data_bytes: int, name: str) -> None:
    last = 0
    for key, place in places.items():
        if place.begin < last:
            raise Overlapping(f"{name}: {key} begins at {place.begin}, before {last}")
        if place.begin > last:
            raise WrongOffsets(f"{name}: nothing from {last} to {place.begin}, where {key} begins")
        last = place.end
    if last != data_bytes:
        raise WrongOffsets(f"{name}: nothing from {last} to its end at {data_bytes}")
