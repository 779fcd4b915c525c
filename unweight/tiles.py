"""The layout in which GPU kernels read a weight matrix: 12 bits a weight in tiles of 64 x 128.

Inputs are interleaved inside a tile so that the 32-bit words a thread loads decode, without leaving
it, into the registers of a tensor-core operand. `README.md` has the layout byte by byte. Weights
are (N outputs, K inputs) uint16, the bits of BF16. Knows nothing of devices, models or files.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unweight.coding import decode, encode
from unweight.strips import MAX_EXCEPTION_SHARE, MAX_SIZE_SHARE, Incompressible
from unweight.window import LARGEST_BASE, choose_bases

OUTPUTS = 64  # of a tile
INPUTS = 128  # of a tile: 8 slots of 16
SLOTS = 8
CHUNK = 1024  # inputs whose exceptions are listed together, for one block of 64 outputs
PLANES = 3  # words of a tile: slots 0..3, slots 4..7, codes
TILE_WORDS = PLANES * OUTPUTS * 16
NIBBLE_SPAN = 16  # bases this close are written in 4 bits

_BLOCK_WEIGHTS = 1 << 19  # packed at a time: temporaries of 0.5 to 4 MB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class U12Tiles:
    """A weight matrix at 12 bits a weight, nothing lost.

    R = ceil(N / 64) blocks of outputs, T = ceil(K / 128) tiles in each, C = ceil(K / 1024) chunks.
    """

    words: NDArray[np.uint32]  # (R, T, 3, 64, 16)
    base: NDArray[np.uint8]  # (64 * R,), or (32 * R,) of nibbles, the even output's the low one
    first_base: int  # added to nibbles; 0 with bytes
    ptr: NDArray[np.int32]  # (R * C + 1,), chunk c of block r has exceptions ptr[r * C + c] ..
    exceptions: NDArray[np.uint32]  # (E,) value << 16 | output % 64 << 10 | k % 1024, rising in 16
    num_outputs: int  # N
    num_inputs: int  # K

    @property
    def bases(self) -> NDArray[np.uint8]:
        """Of every output (64 * R,), from bytes or nibbles."""
        if self.base.size == self.words.shape[0] * OUTPUTS:
            return self.base
        pairs = np.stack([self.base & 0xF, self.base >> 4], axis=1)
        bases: NDArray[np.uint8] = pairs.reshape(-1) + np.uint8(self.first_base)
        return bases

    @property
    def num_bytes(self) -> int:
        """Of all four arrays."""
        return self.words.nbytes + self.base.nbytes + self.ptr.nbytes + self.exceptions.nbytes


def grid(num_outputs: int, num_inputs: int) -> tuple[int, int, int]:
    """Blocks of outputs, tiles of a block, chunks of a block: (R, T, C)."""
    return -(-num_outputs // OUTPUTS), -(-num_inputs // INPUTS), -(-num_inputs // CHUNK)


def tiles_bytes(num_outputs: int, num_inputs: int, num_exceptions: int, *, nibbles: bool) -> int:
    """Of all arrays, with their padding."""
    num_blocks, num_tiles, num_chunks = grid(num_outputs, num_inputs)
    words = num_blocks * num_tiles * TILE_WORDS * 4
    base = num_blocks * OUTPUTS // (2 if nibbles else 1)
    return words + base + (num_blocks * num_chunks + 1) * 4 + num_exceptions * 4


def choose_tile_bases(weights: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], int | None]:
    """The base of every row (N,), and the lowest if all are within 16 of it: nibbles will do.

    Rows of zeros, for which any base does, take the lowest of the others.
    """
    exponents = (weights >> 7).astype(np.uint8)
    bases = choose_bases(exponents)
    return settle_bases(bases, exponents.max(axis=1) > 0)


def settle_bases(
    bases: NDArray[np.uint8], matters: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], int | None]:
    """Of the best bases of rows, and whether a row has a weight to code: what `choose_tile_bases`
    returns."""
    first = int(bases[matters].min(initial=LARGEST_BASE))
    settled = np.where(matters, bases, first).astype(np.uint8)
    return settled, first if int(settled.max(initial=first)) - first < NIBBLE_SPAN else None


def pack_bases(
    bases: NDArray[np.uint8], first: int | None, num_blocks: int
) -> tuple[NDArray[np.uint8], int]:
    """`base` and `first_base` of the layout, of the bases of all outputs (N,)."""
    padded = np.full(num_blocks * OUTPUTS, bases[-1], np.uint8)
    padded[: bases.size] = bases
    if first is None:
        return padded, 0
    nibbles = padded - np.uint8(first)
    return (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8), first


def pack_tiles(
    weights: NDArray[np.uint16],
    *,
    threads: int = 1,
    max_exception_share: float = MAX_EXCEPTION_SHARE,
    max_size_share: float = MAX_SIZE_SHARE,
) -> U12Tiles:
    """Tiles of weights (N, K); raises `Incompressible`.

    The shares are exceptions per weight, and bytes per byte of the matrix in BF16.
    """
    num_outputs, num_inputs = weights.shape
    num_blocks, num_tiles, num_chunks = grid(num_outputs, num_inputs)
    words = np.empty((num_blocks, num_tiles, PLANES, OUTPUTS, 16), np.uint32)
    blocks = _blocks(num_blocks, num_tiles)
    with ThreadPoolExecutor(threads) as pool:
        chosen = list(pool.map(lambda block: _best_bases(weights, block), blocks))
        best, matters = (np.concatenate(some) for some in zip(*chosen, strict=True))
        bases, first = settle_bases(best, matters)

        def pack(block: slice) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
            own = bases[block.start * OUTPUTS : block.stop * OUTPUTS]
            return _pack_blocks(padded_rows(weights, block), own, words[block], num_chunks)

        packed = list(pool.map(pack, blocks))
    exceptions = np.concatenate([some for some, _ in packed])
    base, first_base = pack_bases(bases, first, num_blocks)
    check_pays(weights.shape, exceptions.size, first, max_exception_share, max_size_share)
    return U12Tiles(
        words=words,
        base=base,
        first_base=first_base,
        ptr=np.concatenate([[0], *(counts for _, counts in packed)]).cumsum().astype(np.int32),
        exceptions=exceptions,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
    )


def check_pays(
    shape: tuple[int, ...],
    num_exceptions: int,
    first_base: int | None,
    max_exception_share: float = MAX_EXCEPTION_SHARE,
    max_size_share: float = MAX_SIZE_SHARE,
) -> None:
    """Raises `Incompressible` where a matrix in tiles is not worth it."""
    num_outputs, num_inputs = shape
    allowed = int(max_exception_share * num_outputs * num_inputs)
    if num_exceptions > allowed:
        raise Incompressible(
            f"{num_exceptions} exceptions in {num_outputs} x {num_inputs} weights, at most "
            f"{max_exception_share:.2%} pay"
        )
    num_bytes = tiles_bytes(num_outputs, num_inputs, num_exceptions, nibbles=first_base is not None)
    plain_bytes = num_outputs * num_inputs * 2
    if num_bytes > max_size_share * plain_bytes:
        raise Incompressible(
            f"{num_bytes} bytes for {plain_bytes} of BF16, at most {max_size_share:.0%} pay"
        )


def unpack_tiles(tiles: U12Tiles) -> NDArray[np.uint16]:
    """The weights (N, K) that `pack_tiles` was given, every bit of them."""
    num_blocks, num_tiles, num_chunks = grid(tiles.num_outputs, tiles.num_inputs)
    weights = np.empty((num_blocks * OUTPUTS, num_tiles * INPUTS), np.uint16)
    bases = tiles.bases
    for block in _blocks(num_blocks, num_tiles):
        rows = slice(block.start * OUTPUTS, block.stop * OUTPUTS)
        sm, codes = _planes(tiles.words[block])
        weights[rows] = decode(sm, codes, bases[rows])
    place = np.repeat(np.arange(num_blocks * num_chunks), np.diff(tiles.ptr))
    block_of, chunk = np.divmod(place, num_chunks)
    row = block_of * OUTPUTS + (tiles.exceptions >> 10 & 0x3F)
    weights[row, chunk * CHUNK + (tiles.exceptions & 0x3FF)] = tiles.exceptions >> 16
    return weights[: tiles.num_outputs, : tiles.num_inputs].copy()


def padded_rows(weights: NDArray[np.uint16], blocks: slice) -> NDArray[np.uint16]:
    """The rows of some blocks (64 * R, 128 * T), contiguous, +0 where the matrix has ended."""
    rows = weights[blocks.start * OUTPUTS : blocks.stop * OUTPUTS]
    shape = ((blocks.stop - blocks.start) * OUTPUTS, -(-weights.shape[1] // INPUTS) * INPUTS)
    if rows.shape == shape:
        return np.ascontiguousarray(rows)
    padded = np.zeros(shape, np.uint16)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _best_bases(
    weights: NDArray[np.uint16], blocks: slice
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    rows = weights[blocks.start * OUTPUTS : blocks.stop * OUTPUTS]
    exponents = (rows >> 7).astype(np.uint8)
    return choose_bases(exponents), exponents.max(axis=1) > 0


def _pack_blocks(
    rows: NDArray[np.uint16], bases: NDArray[np.uint8], words: NDArray[np.uint32], num_chunks: int
) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Fills words (R, T, 3, 64, 16) from rows (64 * R, 128 * T).

    Returns the exceptions, and how many each chunk of each block has (R * C,).
    """
    num_blocks, num_tiles = words.shape[:2]
    bases = np.concatenate([bases, np.zeros(len(rows) - bases.size, np.uint8)])
    sm, codes, exceptional = encode(rows, bases)
    slots = sm.reshape(num_blocks, OUTPUTS, num_tiles, 2, 4, 16).transpose(0, 2, 3, 1, 5, 4)
    words[:, :, :2] = np.ascontiguousarray(slots).view("<u4")[..., 0]
    pairs = codes.reshape(num_blocks, OUTPUTS, num_tiles, 4, 2, 16)
    nibbles = pairs[..., 0, :] | pairs[..., 1, :] << 4
    words[:, :, 2] = np.ascontiguousarray(nibbles.transpose(0, 2, 1, 4, 3)).view("<u4")[..., 0]

    row, k = np.divmod(exceptional, rows.shape[1])
    place = row // OUTPUTS * num_chunks + k // CHUNK
    order = np.argsort(place, kind="stable")  # by row, then k, inside a place
    value = rows.reshape(-1)[exceptional].astype(np.uint32)
    listed = value << 16 | (row % OUTPUTS << 10 | k % CHUNK).astype(np.uint32)
    return listed[order], np.bincount(place, minlength=num_blocks * num_chunks)


def _planes(words: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sign-mantissa bytes and codes, each (64 * R, 128 * T), out of words (R, T, 3, 64, 16)."""
    num_blocks, num_tiles = words.shape[:2]
    shape = (num_blocks * OUTPUTS, num_tiles * INPUTS)
    slots = np.ascontiguousarray(words[:, :, :2]).view(np.uint8)
    slots = slots.reshape(num_blocks, num_tiles, 2, OUTPUTS, 16, 4).transpose(0, 3, 1, 2, 5, 4)
    pairs = np.ascontiguousarray(words[:, :, 2]).view(np.uint8)
    pairs = pairs.reshape(num_blocks, num_tiles, OUTPUTS, 16, 4)
    codes = np.stack([pairs & 0xF, pairs >> 4], axis=-1)  # (R, T, 64, 16, 4, 2)
    return slots.reshape(shape), codes.transpose(0, 2, 1, 4, 5, 3).reshape(shape)


def _blocks(num_blocks: int, num_tiles: int) -> list[slice]:
    """Blocks of outputs that are worked on together, of about `_BLOCK_WEIGHTS`."""
    step = max(1, _BLOCK_WEIGHTS // (OUTPUTS * num_tiles * INPUTS))
    return [slice(r, min(r + step, num_blocks)) for r in range(0, num_blocks, step)]
