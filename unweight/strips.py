"""The layouts in which CPU kernels read a weight matrix: BF16 strips and 12-bit lossless strips.

A strip is 16 outputs wide, one to a lane of a 64-byte vector, so that a kernel never sums across
lanes. `README.md` has both layouts byte by byte. Weights are (N outputs, K inputs) uint16, the bits
of BF16. Knows nothing of models, files or kernels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unweight.coding import decode, encode
from unweight.window import choose_bases

OUTPUTS = 16  # of a strip
INPUTS = 8  # of a group, the unit of 12-bit strips
GROUP = np.dtype([("sm", "u1", (4, OUTPUTS, 2)), ("codes", "<u2", (OUTPUTS, 2))])  # 192 bytes
EXCEPTION = np.dtype([("k", "<i4"), ("row", "<u2"), ("value", "<u2")])

# More exceptions than this and a tensor stays BF16. Every exception is a scattered store in the
# kernel's inner loop and 64 bits of list; at 0.4 % the list is 0.26 bits a weight, and a strip of
# 576 inputs has 37 of them. Trained weights have under a tenth of that (README.md).
MAX_EXCEPTION_SHARE = 0.004
# Bytes against BF16 strips. Within the other limit only matrices of up to 16 inputs exceed it:
# their bases and pointers cost a sixth or more of what the codes save.
MAX_SIZE_SHARE = 0.80

_BLOCK_WEIGHTS = 1 << 18  # packed at a time: temporaries of 0.25 to 2 MB, which stay in cache
_CACHE_LINE = 64


class Incompressible(Exception):
    """12-bit strips would not pay for this tensor: keep it as BF16 strips."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class U12Strips:
    """A weight matrix at 12 bits a weight, nothing lost. S = ceil(N / 16), G = ceil(K / 8)."""

    data: NDArray[np.uint8]  # (S * G * 192,), group after group of one strip, then the next strip
    base: NDArray[np.uint8]  # (16 * S,), of each output: a code c means the exponent base + c
    ptr: NDArray[np.int32]  # (S + 1,), strip s has the exceptions ptr[s] .. ptr[s + 1]
    exceptions: NDArray[np.void]  # (E,) EXCEPTION, of a strip by k, then row (0..15)
    num_outputs: int  # N
    num_inputs: int  # K

    @property
    def groups(self) -> NDArray[np.void]:
        """`data` as (S, G) GROUP, a view."""
        return self.data.view(GROUP).reshape(grid(self.num_outputs, self.num_inputs))

    @property
    def num_bytes(self) -> int:
        """Of all four arrays."""
        return self.data.nbytes + self.base.nbytes + self.ptr.nbytes + self.exceptions.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class U12Sizes:
    """Bytes of the arrays of a `U12Strips`; `exceptions` is that of each one."""

    data: int
    base: int
    ptr: int
    exceptions: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.data + self.base + self.ptr + self.exceptions


def grid(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Strips of a matrix, and groups of a strip: (S, G)."""
    return -(-num_outputs // OUTPUTS), -(-num_inputs // INPUTS)


def bf16_bytes(num_outputs: int, num_inputs: int) -> int:
    """Bytes of BF16 strips, with their padding."""
    num_strips, num_groups = grid(num_outputs, num_inputs)
    return num_strips * OUTPUTS * num_groups * INPUTS * 2


def u12_bytes(num_outputs: int, num_inputs: int, num_exceptions: int = 0) -> U12Sizes:
    """Bytes of 12-bit strips, part by part, with their padding."""
    num_strips, num_groups = grid(num_outputs, num_inputs)
    return U12Sizes(
        data=num_strips * num_groups * GROUP.itemsize,
        base=num_strips * OUTPUTS,
        ptr=(num_strips + 1) * 4,
        exceptions=num_exceptions * EXCEPTION.itemsize,
    )


def pack_bf16(weights: NDArray[np.uint16], *, threads: int = 1) -> NDArray[np.uint8]:
    """BF16 strips of weights (N, K), on a cache line: (S, 4 * G pairs, 16 outputs, 2) uint16."""
    num_strips, num_groups = grid(*weights.shape)
    packed = _empty_bytes(bf16_bytes(*weights.shape))
    strips = packed.view("<u4").reshape(num_strips, num_groups * INPUTS // 2, OUTPUTS)

    def pack(block: slice) -> None:
        pairs = _padded(weights, block).view("<u4").reshape(-1, OUTPUTS, strips.shape[1])
        strips[block] = pairs.transpose(0, 2, 1)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(pack, _blocks(weights)):
            pass
    return packed


def unpack_bf16(packed: NDArray[np.uint8], num_outputs: int, num_inputs: int) -> NDArray[np.uint16]:
    """The weights (N, K) that `pack_bf16` was given."""
    num_strips, num_groups = grid(num_outputs, num_inputs)
    strips = packed.view("<u2").reshape(num_strips, num_groups * INPUTS // 2, OUTPUTS, 2)
    weights = strips.transpose(0, 2, 1, 3).reshape(num_strips * OUTPUTS, num_groups * INPUTS)
    return weights[:num_outputs, :num_inputs].copy()


def pack_u12(
    weights: NDArray[np.uint16],
    *,
    threads: int = 1,
    max_exception_share: float = MAX_EXCEPTION_SHARE,
    max_size_share: float = MAX_SIZE_SHARE,
) -> U12Strips:
    """12-bit strips of weights (N, K), `data` on a cache line; raises `Incompressible`.

    The shares are exceptions per weight, and bytes per byte of BF16 strips.
    """
    num_outputs, num_inputs = weights.shape
    num_strips, num_groups = grid(num_outputs, num_inputs)
    data = _empty_bytes(u12_bytes(num_outputs, num_inputs).data)
    groups = data.view(GROUP).reshape(num_strips, num_groups)
    base = np.empty((num_strips, OUTPUTS), np.uint8)

    def pack(block: slice) -> tuple[NDArray[np.void], NDArray[np.intp]]:
        return _pack_block(_padded(weights, block), groups[block], base[block])

    num_allowed = int(max_exception_share * weights.size)
    num_exceptions = 0
    listed, counted = [], []
    with ThreadPoolExecutor(threads) as pool:
        for exceptions, per_strip in pool.map(pack, _blocks(weights)):
            num_exceptions += exceptions.size
            if num_exceptions > num_allowed:
                raise Incompressible(
                    f"over {num_allowed} exceptions in {weights.size} weights, at most "
                    f"{max_exception_share:.2%} pay"
                )
            listed.append(exceptions)
            counted.append(per_strip)
    num_bytes = u12_bytes(num_outputs, num_inputs, num_exceptions).total
    plain_bytes = bf16_bytes(num_outputs, num_inputs)
    if num_bytes > max_size_share * plain_bytes:
        raise Incompressible(
            f"{num_bytes} bytes for {plain_bytes} of BF16, at most {max_size_share:.0%} pay"
        )
    return U12Strips(
        data=data,
        base=base.reshape(-1),
        ptr=np.concatenate([[0], *counted]).cumsum().astype(np.int32),
        exceptions=np.concatenate(listed),
        num_outputs=num_outputs,
        num_inputs=num_inputs,
    )


def unpack_u12(strips: U12Strips) -> NDArray[np.uint16]:
    """The weights (N, K) that `pack_u12` was given, every bit of them."""
    weights = np.empty((strips.num_outputs, strips.num_inputs), np.uint16)
    for block in _blocks(weights):
        first, end = block.start * OUTPUTS, min(block.stop * OUTPUTS, strips.num_outputs)
        weights[first:end] = rows_u12(strips, np.arange(first, end))
    return weights


def rows_u12(strips: U12Strips, outputs: NDArray[np.intp]) -> NDArray[np.uint16]:
    """The weights (R, K) of some outputs (R,): of an embedding matrix, the embeddings of R ids."""
    strip, row = np.divmod(outputs, OUTPUTS)
    codes = _codes(strips.groups["codes"].view("<u4")[..., 0][strip, :, row])  # (R, 8 * G)
    pairs = strips.groups["sm"].view("<u2")[..., 0][strip, :, :, row]  # (R, G, 4)
    sm = pairs.view(np.uint8).reshape(codes.shape)
    weights = decode(sm, codes, strips.base[outputs])[:, : strips.num_inputs]
    for weights_of_row, s, i in zip(weights, strip, row, strict=True):
        exceptions = strips.exceptions[strips.ptr[s] : strips.ptr[s + 1]]
        own = exceptions[exceptions["row"] == i]
        weights_of_row[own["k"]] = own["value"]
    return weights


def _pack_block(
    words: NDArray[np.uint16], groups: NDArray[np.void], base: NDArray[np.uint8]
) -> tuple[NDArray[np.void], NDArray[np.intp]]:
    """Fills groups (S, G) and base (S, 16) from words (16 * S, 8 * G).

    Returns the exceptions, and how many of them each strip has (S,).
    """
    num_strips, num_groups = groups.shape
    bases = choose_bases((words >> 7).astype(np.uint8))
    sm, codes, exceptional = encode(words, bases)
    pairs = sm.view("<u2").reshape(num_strips, OUTPUTS, num_groups, 4)
    groups["sm"].view("<u2")[..., 0] = pairs.transpose(0, 2, 3, 1)
    nibbles = _nibbles(codes).reshape(num_strips, OUTPUTS, num_groups)
    groups["codes"].view("<u4")[..., 0] = nibbles.transpose(0, 2, 1)
    base[:] = bases.reshape(num_strips, OUTPUTS)
    return _list_exceptions(words, exceptional, num_strips)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Codes (R, 8 * G) as the layout has them: (R, G), the two words of codes of 8 inputs."""
    pairs = codes.view("<u8")  # byte 2 * j + p
    pairs = pairs | pairs >> 12  # bytes 0 and 1: j = 0 and 1 of p = 0, of p = 1; 4 and 5: 2 and 3
    first, second = pairs & 0xFF | pairs >> 24 & 0xFF00, pairs >> 8 & 0xFF | pairs >> 32 & 0xFF00
    nibbles: NDArray[np.uint64] = first | second << 16
    return nibbles.astype(np.uint32)


def _codes(nibbles: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Undoes `_nibbles`."""
    words = nibbles.astype(np.uint64)
    pairs = words & 0xFF | words >> 8 & 0xFF00 | (words & 0xFF00) << 24 | (words >> 24 & 0xFF) << 40
    codes = pairs & 0x0F0F00000F0F | (pairs & 0xF0F00000F0F0) << 12
    return codes.view(np.uint8).reshape(nibbles.shape[0], -1)


def _list_exceptions(
    words: NDArray[np.uint16], exceptional: NDArray[np.intp], num_strips: int
) -> tuple[NDArray[np.void], NDArray[np.intp]]:
    """The exceptions at places of words, in the order of the layout, and each strip's number."""
    output, k = np.divmod(exceptional, words.shape[1])
    strip, row = np.divmod(output, OUTPUTS)
    exceptions = np.empty(exceptional.size, EXCEPTION)
    exceptions["k"], exceptions["row"] = k, row
    exceptions["value"] = words.reshape(-1)[exceptional]
    return exceptions[np.lexsort((row, k, strip))], np.bincount(strip, minlength=num_strips)


def _blocks(weights: NDArray[np.uint16]) -> list[slice]:
    """Strips that are worked on together: blocks of about `_BLOCK_WEIGHTS`."""
    num_strips, num_groups = grid(*weights.shape)
    step = max(1, _BLOCK_WEIGHTS // (OUTPUTS * num_groups * INPUTS))
    return [slice(s, min(s + step, num_strips)) for s in range(0, num_strips, step)]


def _padded(weights: NDArray[np.uint16], strips: slice) -> NDArray[np.uint16]:
    """The rows of some strips (16 * S, 8 * G), contiguous, +0 where the matrix has ended."""
    assert weights.dtype == np.uint16
    assert weights.size
    _, num_groups = grid(*weights.shape)
    rows = weights[strips.start * OUTPUTS : strips.stop * OUTPUTS]
    shape = ((strips.stop - strips.start) * OUTPUTS, num_groups * INPUTS)
    if rows.shape == shape:
        return np.ascontiguousarray(rows)
    padded = np.zeros(shape, np.uint16)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _empty_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Bytes that start on a cache line, as numpy's own do not: no load of a kernel crosses one."""
    memory = np.empty(num_bytes + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + num_bytes]
