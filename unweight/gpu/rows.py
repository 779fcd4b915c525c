"""Rows of a matrix in 12-bit tiles by number: embeddings out of a tied output matrix.

One copy of the matrix serves both, the look-up and the product. Knows no token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unweight.gpu.decode import how_to_decode, row_bases
from unweight.gpu.scratch import joined_slots
from unweight.gpu.weight import DeviceTiles


@triton.jit
def rows_kernel(
    ids_ptr, words_ptr, base_ptr, ptr_ptr, list_ptr, out_ptr,
    K, num_tiles, first_base, out_stride,
    NIBBLES: tl.constexpr, HOW: tl.constexpr, LISTED: tl.constexpr = 32,
):  # fmt: skip
    """One id, one chunk of 1024 inputs."""
    m, c = tl.program_id(0), tl.program_id(1)
    n = tl.load(ids_ptr + m).to(tl.int32)
    t = c * 8 + tl.arange(0, 8)
    own = words_ptr + (n // 64).to(tl.int64) * num_tiles * 3072 + n % 64 * 16
    word = t[:, None] * 3072 + tl.arange(0, 16)[None, :]
    inside = (t < num_tiles)[:, None]
    add = (row_bases(base_ptr, tl.full((8,), 0, tl.int32) + n, first_base, NIBBLES) - 112) << 7
    bits = joined_slots(
        tl.load(own + word, mask=inside, other=0),
        tl.load(own + 1024 + word, mask=inside, other=0),
        tl.load(own + 2048 + word, mask=inside, other=0),
        add.to(tl.int16)[:, None],
        8,
        HOW,
    )
    k = t[:, None] * 128 + tl.arange(0, 128)[None, :]
    out = out_ptr + m.to(tl.int64) * out_stride
    tl.store(out + k, bits, mask=k < K)

    place = n // 64 * tl.cdiv(num_tiles, 8) + c
    first, end = tl.load(ptr_ptr + place), tl.load(ptr_ptr + place + 1)
    if first < end:
        tl.debug_barrier()  # other threads have stored zeros where these go
        for e in range(first, end, LISTED):
            listed = e + tl.arange(0, LISTED)
            ok = listed < end
            entry = tl.load(list_ptr + listed, mask=ok, other=0)
            mine = ok & (((entry >> 10) & 63) == n % 64)
            at = c * 1024 + (entry & 1023)
            tl.store(out + at, (entry >> 16).to(tl.int16), mask=mine)


def take_rows(tiles: DeviceTiles, ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows ids (M,) of the matrix, (M, K) bf16, bit for bit; ids int32 or int64, on its device.

    Raises IndexError for an id outside 0 to N - 1 in host memory. On a device the caller answers
    for them, as for those of `torch.nn.functional.embedding`: looking would wait for the device.
    """
    assert ids.ndim == 1
    assert not ids.is_floating_point()
    if ids.device.type == "cpu" and len(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= tiles.num_outputs:
            raise IndexError(f"rows {low} to {high} of a matrix of {tiles.num_outputs}")
    shape = len(ids), tiles.num_inputs
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=tiles.words.device)
    assert out.shape == shape
    assert out.dtype == torch.bfloat16
    assert out.stride(1) == 1
    if not len(ids):
        return out
    rows_kernel[(len(ids), tiles.num_chunks)](
        ids, tiles.words, tiles.base, tiles.ptr, tiles.exceptions, out.view(torch.int16),
        tiles.num_inputs, tiles.words.shape[1], tiles.first_base, out.stride(0),
        NIBBLES=tiles.nibbles, HOW=how_to_decode(out.device), num_warps=1,
    )  # fmt: skip
    return out
