"""Whether 12-bit strips or tiles that come from a file may be given to a kernel. Knows no file.

A kernel checks nothing: it adds k and row to addresses, and follows ptr. Arrays that pass here make
it read and write inside its arrays, and decode to finite weights but for the listed exceptions.
Whether they are the right weights only a digest can tell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unweight.strips import EXCEPTION, INPUTS, OUTPUTS, U12Strips, grid, u12_bytes
from unweight.tiles import CHUNK, PLANES, U12Tiles
from unweight.tiles import OUTPUTS as TILE_OUTPUTS
from unweight.tiles import grid as tile_grid
from unweight.window import LARGEST_BASE

ALIGNMENT = 8  # of the start of every array; 64 for data, where it is to be fast


class BadStrips(Exception):
    """Strips or tiles that break the layout."""


class WrongSize(BadStrips):
    """An array is not of the type or the length that the matrix asks for, or not in one piece."""


class Misaligned(BadStrips):
    """An array that does not start at a multiple of 8 bytes, as one of words and records must."""


class BaseOutOfRange(BadStrips):
    """A base that puts exponent 255, which is Inf and NaN, in reach of a code."""


class BadPointers(BadStrips):
    """`ptr` does not part the exceptions: it starts late, ends early or runs backwards."""


class OutsideMatrix(BadStrips):
    """An exception at an output or input that the matrix lacks, or padding that is not +0."""


class OutOfOrder(BadStrips):
    """Exceptions of a strip that do not rise by k, then row; or two for one weight."""


def check(strips: U12Strips) -> None:
    """Raises the `BadStrips` that names what is wrong, if anything is."""
    _check_sizes(strips)
    if strips.base.max() > LARGEST_BASE:
        raise BaseOutOfRange(f"base {strips.base.max()}, at most {LARGEST_BASE}")
    _check_pointers(strips.ptr, strips.exceptions.size)
    _check_exceptions(strips)
    _check_padding(strips)


def check_tiles(tiles: U12Tiles) -> None:
    """The same of tiles."""
    num_outputs, num_inputs = tiles.num_outputs, tiles.num_inputs
    if num_outputs < 1 or num_inputs < 1:
        raise WrongSize(f"a matrix of {num_outputs} x {num_inputs}")
    num_blocks, num_tiles, num_chunks = tile_grid(num_outputs, num_inputs)
    if tiles.words.shape != (num_blocks, num_tiles, PLANES, TILE_OUTPUTS, 16):
        raise WrongSize(f"words are {tiles.words.shape}, and {num_blocks} x {num_tiles} tiles")
    nibbles = tiles.base.size == num_blocks * TILE_OUTPUTS // 2
    bases = num_blocks * TILE_OUTPUTS // (2 if nibbles else 1)
    _check_array("words", tiles.words.reshape(-1), np.dtype("<u4"), tiles.words.size * 4)
    _check_array("base", tiles.base, np.dtype(np.uint8), bases)
    _check_array("ptr", tiles.ptr, np.dtype("<i4"), (num_blocks * num_chunks + 1) * 4)
    _check_array("exceptions", tiles.exceptions, np.dtype("<u4"), tiles.exceptions.size * 4)
    if not 0 <= tiles.first_base <= (LARGEST_BASE if nibbles else 0):
        raise BaseOutOfRange(f"first base {tiles.first_base}")
    highest = int((tiles.base & 15).max() if nibbles else 0)
    highest = max(highest, int(tiles.base.max()) >> 4) if nibbles else int(tiles.base.max())
    if tiles.first_base + highest > LARGEST_BASE:
        raise BaseOutOfRange(f"base {tiles.first_base + highest}, at most {LARGEST_BASE}")
    _check_pointers(tiles.ptr, tiles.exceptions.size)
    _check_tile_exceptions(tiles, num_chunks)


def _check_tile_exceptions(tiles: U12Tiles, num_chunks: int) -> None:
    place = np.repeat(np.arange(tiles.ptr.size - 1), np.diff(tiles.ptr))
    block, chunk = np.divmod(place, num_chunks)
    row, k = tiles.exceptions >> 10 & 0x3F, tiles.exceptions & 0x3FF
    outside = (block * TILE_OUTPUTS + row >= tiles.num_outputs) | (
        chunk * CHUNK + k >= tiles.num_inputs
    )
    if outside.any():
        first = int(outside.argmax())
        raise OutsideMatrix(f"exception {first} is row {row[first]}, k {k[first]} of its chunk")
    order = place << 16 | tiles.exceptions & 0xFFFF
    if (order[1:] <= order[:-1]).any():
        raise OutOfOrder(f"exception {int((order[1:] <= order[:-1]).argmax()) + 1} is out of order")


def _check_sizes(strips: U12Strips) -> None:
    num_outputs, num_inputs = strips.num_outputs, strips.num_inputs
    if num_outputs < 1 or num_inputs < 1:
        raise WrongSize(f"a matrix of {num_outputs} x {num_inputs}")
    sizes = u12_bytes(num_outputs, num_inputs, strips.exceptions.size)
    _check_array("data", strips.data, np.dtype(np.uint8), sizes.data)
    _check_array("base", strips.base, np.dtype(np.uint8), sizes.base)
    _check_array("ptr", strips.ptr, np.dtype("<i4"), sizes.ptr)
    _check_array("exceptions", strips.exceptions, EXCEPTION, sizes.exceptions)


def _check_array(name: str, array: NDArray[Any], dtype: np.dtype[Any], num_bytes: int) -> None:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise WrongSize(f"{name} is not one contiguous row of {dtype}")
    if array.nbytes != num_bytes:
        raise WrongSize(f"{name} has {array.nbytes} bytes and the matrix asks for {num_bytes}")
    if array.ctypes.data % ALIGNMENT:
        raise Misaligned(f"{name} starts {array.ctypes.data % ALIGNMENT} bytes off")


def _check_pointers(ptr: NDArray[np.int32], num_exceptions: int) -> None:
    if ptr[0] != 0 or ptr[-1] != num_exceptions:
        raise BadPointers(f"ptr runs from {ptr[0]} to {ptr[-1]} over {num_exceptions} exceptions")
    backwards = np.flatnonzero(ptr[1:] < ptr[:-1])
    if backwards.size:
        raise BadPointers(f"ptr falls after place {backwards[0]}")


def _check_exceptions(strips: U12Strips) -> None:
    k, row = strips.exceptions["k"].astype(np.int64), strips.exceptions["row"].astype(np.int64)
    strip = np.repeat(np.arange(strips.ptr.size - 1), np.diff(strips.ptr))
    outside = (k < 0) | (k >= strips.num_inputs) | (row >= OUTPUTS)
    outside |= strip * OUTPUTS + row >= strips.num_outputs
    if outside.any():
        first = int(outside.argmax())
        raise OutsideMatrix(f"exception {first} is row {row[first]}, k {k[first]} of its strip")
    place = (strip * strips.num_inputs + k) * OUTPUTS + row
    if (place[1:] <= place[:-1]).any():
        raise OutOfOrder(f"exception {int((place[1:] <= place[:-1]).argmax()) + 1} is out of order")


def _check_padding(strips: U12Strips) -> None:
    """Padding meets padding in the activations, so that only +0 there changes no sum."""
    num_strips, num_groups = grid(strips.num_outputs, strips.num_inputs)
    lanes = strips.num_outputs - (num_strips - 1) * OUTPUTS  # in use in the last strip
    inputs = strips.num_inputs - (num_groups - 1) * INPUTS  # in use in every strip's last group
    last_strip, last_groups = strips.groups[-1], strips.groups[:, -1]
    used = np.arange(INPUTS).reshape(4, 1, 2) < inputs  # (j, 1, p)
    nibbles = (used[:, 0] * np.array([[0xF], [0xF0], [0xF00], [0xF000]])).sum(axis=0)  # (p,)
    filled = (
        last_strip["sm"][:, :, lanes:].any()
        or last_strip["codes"][:, lanes:].any()
        or (last_groups["sm"] * ~used).any()
        or (last_groups["codes"] & ~nibbles).any()
    )
    if filled:
        raise OutsideMatrix("padding is not +0")
