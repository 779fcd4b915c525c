"""12-bit tiles back to BF16 on the device: the same bits, exceptions and all.

For products of many rows, where decoding once and a dense product cost less than decoding in every
program. Knows no product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unweight.gpu.decode import decode_words, how_to_decode, row_bases
from unweight.gpu.weight import DeviceTiles


@triton.jit
def joined_slots(first, second, codes, add, ROWS: tl.constexpr, HOW: tl.constexpr):
    """The bits of weights, int16 (ROWS, 128), out of the words (ROWS, 16) of three planes; `add`
    (ROWS, 1) int16 is (base - 112) << 7 of each row."""
    w0, w1, w2, w3, w4, w5, w6, w7 = decode_words(first, second, codes, HOW)
    w = tl.join(
        tl.join(tl.join(w0, w4), tl.join(w2, w6)),
        tl.join(tl.join(w1, w5), tl.join(w3, w7)),
    )
    bits = tl.reshape(tl.permute(w, (0, 2, 3, 4, 1)), (ROWS, 128)).to(tl.int16, bitcast=True)
    return tl.where((bits & 0x7FFF) != 0, bits + add, bits)


@triton.jit
def unpack_kernel(
    words_ptr, base_ptr, ptr_ptr, list_ptr, out_ptr,
    N, K, num_tiles, first_base, out_stride,
    NIBBLES: tl.constexpr, HOW: tl.constexpr, LISTED: tl.constexpr = 32,
):  # fmt: skip
    """One tile: 64 outputs, 128 inputs."""
    t, r = tl.program_id(0), tl.program_id(1)
    rows = r * 64 + tl.arange(0, 64)
    word = tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    p = words_ptr + (r.to(tl.int64) * num_tiles + t) * 3072
    add = (row_bases(base_ptr, rows, first_base, NIBBLES) - 112) << 7
    bits = joined_slots(
        tl.load(p + word),
        tl.load(p + 1024 + word),
        tl.load(p + 2048 + word),
        add.to(tl.int16)[:, None],
        64,
        HOW,
    )
    k = t * 128 + tl.arange(0, 128)
    out = out_ptr + rows[:, None].to(tl.int64) * out_stride + k[None, :]
    tl.store(out, bits, mask=(rows < N)[:, None] & (k < K)[None, :])

    place = r * tl.cdiv(num_tiles, 8) + t // 8
    first, end = tl.load(ptr_ptr + place), tl.load(ptr_ptr + place + 1)
    if first < end:
        tl.debug_barrier()  # other threads have stored zeros where these go
        for e in range(first, end, LISTED):
            listed = e + tl.arange(0, LISTED)
            ok = listed < end
            entry = tl.load(list_ptr + listed, mask=ok, other=0)
            row = r * 64 + ((entry >> 10) & 63)
            at = entry & 1023
            own = out_ptr + row.to(tl.int64) * out_stride + t // 8 * 1024 + at
            tl.store(own, (entry >> 16).to(tl.int16), mask=ok & (at // 128 == t % 8))


def unpack_on_device(tiles: DeviceTiles, out: Tensor | None = None) -> Tensor:
    """The matrix, (N, K) bf16, bit for bit; into `out` if given, whose inputs are side by side."""
    shape = tiles.num_outputs, tiles.num_inputs
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=tiles.words.device)
    assert out.shape == shape
    assert out.dtype == torch.bfloat16
    assert out.stride(1) == 1
    num_blocks, num_tiles = tiles.words.shape[:2]
    unpack_kernel[(num_tiles, num_blocks)](
        tiles.words, tiles.base, tiles.ptr, tiles.exceptions, out.view(torch.int16),
        *shape, num_tiles, tiles.first_base, out.stride(0),
        NIBBLES=tiles.nibbles, HOW=how_to_decode(out.device), num_warps=4,
    )  # fmt: skip
    return out
