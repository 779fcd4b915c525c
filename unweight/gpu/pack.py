"""12-bit tiles made on the device, of BF16 or of its two planes: as `tiles.pack_tiles` has them.

For weights that come uncompressed or entropy coded: nothing but the tiles is made of them.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from unweight.gpu.weight import DeviceTiles
from unweight.strips import MAX_EXCEPTION_SHARE, MAX_SIZE_SHARE
from unweight.tiles import (
    CHUNK,
    OUTPUTS,
    PLANES,
    check_pays,
    grid,
    pack_bases,
    settle_bases,
)
from unweight.window import LARGEST_BASE, WINDOW

_ROWS = 8192  # whose histograms are in memory at a time: 8 MB of them


@triton.jit
def _bits(weights_ptr, exponents_ptr, at, mask, PLANED: tl.constexpr):
    """The bits of weights at offsets `at` as int32: of BF16, or of the planes of `split_planes`."""
    if PLANED:
        sm = tl.load(weights_ptr + at, mask=mask, other=0).to(tl.int32)
        exponent = tl.load(exponents_ptr + at, mask=mask, other=0).to(tl.int32)
        return ((sm & 0x80) << 8) | (exponent << 7) | (sm & 0x7F)
    else:
        return tl.load(weights_ptr + at, mask=mask, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def _is_exception(bits, base):
    code = ((bits >> 7) & 0xFF) - base
    return ((code < 1) | (code > 15)) & ((bits & 0x7FFF) != 0)


@triton.jit
def histogram_kernel(
    weights_ptr, exponents_ptr, counts_ptr, first_row, K,
    PLANED: tl.constexpr, BLOCK: tl.constexpr = 1024,
):  # fmt: skip
    """How often each exponent occurs in one row: (256,) int32."""
    row = tl.program_id(0)
    counts = tl.zeros((256,), tl.int32)
    start = (first_row + row).to(tl.int64) * K
    for k_0 in range(0, K, BLOCK):
        k = k_0 + tl.arange(0, BLOCK)
        bits = _bits(weights_ptr, exponents_ptr, start + k, k < K, PLANED)
        counts += tl.histogram((bits >> 7) & 0xFF, 256)  # what is past the row counts as zeros
    tl.store(counts_ptr + row.to(tl.int64) * 256 + tl.arange(0, 256), counts)


@triton.jit
def pack_kernel(
    weights_ptr, exponents_ptr, bases_ptr, words_ptr, counts_ptr, N, K, num_tiles,
    PLANED: tl.constexpr,
):  # fmt: skip
    """The words of one tile, and how many exceptions it adds to its chunk's."""
    t, r = tl.program_id(0), tl.program_id(1)
    rows = r * 64 + tl.arange(0, 64)
    columns = tl.arange(0, 16)
    base = tl.load(bases_ptr + rows, mask=rows < N, other=0).to(tl.int32)[:, None]
    first = tl.zeros((64, 16), tl.int32)
    second = tl.zeros((64, 16), tl.int32)
    codes = tl.zeros((64, 16), tl.int32)
    exceptions = tl.zeros((64, 16), tl.int32)
    for j in tl.static_range(8):
        k = t * 128 + j * 16 + columns
        at = rows[:, None].to(tl.int64) * K + k[None, :]
        inside = (rows < N)[:, None] & (k < K)[None, :]
        bits = _bits(weights_ptr, exponents_ptr, at, inside, PLANED)
        exceptional = _is_exception(bits, base)
        plain = ((bits & 0x7FFF) != 0) & (exceptional == 0)
        sm = tl.where(exceptional, 0, ((bits >> 8) & 0x80) | (bits & 0x7F))
        codes |= tl.where(plain, ((bits >> 7) & 0xFF) - base, 0) << (4 * j)
        exceptions += exceptional.to(tl.int32)
        if j < 4:
            first |= sm << (8 * j)
        else:
            second |= sm << (8 * (j - 4))
    word = tl.arange(0, 64)[:, None] * 16 + columns[None, :]
    p = words_ptr + (r.to(tl.int64) * num_tiles + t) * 3072
    tl.store(p + word, first)
    tl.store(p + 1024 + word, second)
    tl.store(p + 2048 + word, codes)
    number = tl.sum(tl.sum(exceptions, axis=1), axis=0)
    if number > 0:
        tl.atomic_add(counts_ptr + r * tl.cdiv(num_tiles, 8) + t // 8, number)


@triton.jit
def list_kernel(
    weights_ptr, exponents_ptr, bases_ptr, ptr_ptr, list_ptr, N, K, num_chunks,
    PLANED: tl.constexpr,
):  # fmt: skip
    """The exceptions of one chunk of one block, by row and then by input."""
    c, r = tl.program_id(0), tl.program_id(1)
    place = r * num_chunks + c
    at, end = tl.load(ptr_ptr + place), tl.load(ptr_ptr + place + 1)
    if at < end:
        k = tl.arange(0, 1024)
        for i in range(tl.minimum(64, N - r * 64)):
            row = r * 64 + i
            inside = c * 1024 + k < K
            offset = row.to(tl.int64) * K + c * 1024 + k
            bits = _bits(weights_ptr, exponents_ptr, offset, inside, PLANED)
            exceptional = _is_exception(bits, tl.load(bases_ptr + row).to(tl.int32)).to(tl.int32)
            entry = (bits << 16) | (i << 10) | k
            to = at + tl.cumsum(exceptional, axis=0) - exceptional
            tl.store(list_ptr + to, entry, mask=exceptional > 0)
            at += tl.sum(exceptional, axis=0)


def pack_on_device(
    weights: Tensor,
    *,
    max_exception_share: float = MAX_EXCEPTION_SHARE,
    max_size_share: float = MAX_SIZE_SHARE,
) -> DeviceTiles:
    """Tiles of weights (N, K) bf16, equal in every array to what `tiles.pack_tiles` makes of them.

    Raises `Incompressible`. The shares are exceptions per weight, and bytes per byte of BF16.
    """
    assert weights.dtype == torch.bfloat16
    return _pack(weights.view(torch.int16), None, max_exception_share, max_size_share)


def pack_planes_on_device(
    sm: Tensor,
    exponents: Tensor,
    *,
    max_exception_share: float = MAX_EXCEPTION_SHARE,
    max_size_share: float = MAX_SIZE_SHARE,
) -> DeviceTiles:
    """The same of the two planes of weights, (N, K) uint8 each: sign << 7 | mantissa, exponents."""
    assert sm.dtype == exponents.dtype == torch.uint8
    assert sm.shape == exponents.shape
    return _pack(sm, exponents, max_exception_share, max_size_share)


def _pack(
    weights: Tensor, exponents: Tensor | None, max_exception_share: float, max_size_share: float
) -> DeviceTiles:
    assert weights.is_contiguous()
    assert exponents is None or exponents.is_contiguous()
    num_outputs, num_inputs = weights.shape
    num_blocks, num_tiles, num_chunks = grid(num_outputs, num_inputs)
    source = weights, weights if exponents is None else exponents
    planed = exponents is not None
    bases, first = settle_bases(*_best_bases(*source, planed=planed))
    device = weights.device
    own_bases = torch.from_numpy(bases).to(device)
    words = torch.empty(
        (num_blocks, num_tiles, PLANES, OUTPUTS, 16), dtype=torch.int32, device=device
    )
    counts = torch.zeros(num_blocks * num_chunks, dtype=torch.int32, device=device)
    pack_kernel[(num_tiles, num_blocks)](
        *source, own_bases, words, counts, num_outputs, num_inputs, num_tiles, PLANED=planed
    )
    ptr = torch.zeros(num_blocks * num_chunks + 1, dtype=torch.int32, device=device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=ptr[1:])
    num_exceptions = int(ptr[-1])
    check_pays(
        (num_outputs, num_inputs), num_exceptions, first, max_exception_share, max_size_share
    )
    listed = torch.empty(num_exceptions, dtype=torch.int32, device=device)
    if num_exceptions:
        list_kernel[(num_chunks, num_blocks)](
            *source, own_bases, ptr, listed, num_outputs, num_inputs, num_chunks, PLANED=planed
        )
    base, first_base = pack_bases(bases, first, num_blocks)
    return DeviceTiles(
        words=words,
        base=torch.from_numpy(base).to(device),
        first_base=first_base,
        ptr=ptr,
        exceptions=listed,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
    )


def _best_bases(
    weights: Tensor, exponents: Tensor, *, planed: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Of every row its best base, and whether it has a weight to code: as `window` chooses."""
    num_rows, num_inputs = weights.shape
    windows = torch.arange(LARGEST_BASE + 1, device=weights.device)
    bases, matters = [], []
    for first_row in range(0, num_rows, _ROWS):
        some = min(_ROWS, num_rows - first_row)
        counts = torch.empty((some, 256), dtype=torch.int32, device=weights.device)
        histogram_kernel[(some,)](weights, exponents, counts, first_row, num_inputs, PLANED=planed)
        up_to = counts.cumsum(1)
        covered = up_to[:, WINDOW : WINDOW + LARGEST_BASE + 1] - up_to[:, : LARGEST_BASE + 1]
        # The lowest of windows that hold equally many: an argmax may take any of them.
        bases.append(LARGEST_BASE - (covered * 256 + LARGEST_BASE - windows).amax(1) % 256)
        matters.append(counts[:, 1:].any(1))
    return (
        torch.cat(bases).to(torch.uint8).cpu().numpy(),
        torch.cat(matters).cpu().numpy(),
    )


assert CHUNK == 1024  # as the kernels have it
