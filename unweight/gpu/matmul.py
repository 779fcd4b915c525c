"""y = x @ W.T with W in 12-bit tiles, decoded in the registers that feed the tensor cores.

The sum of an output runs over its inputs in one order, in pieces that depend on the shape of W
alone, so a row of y has the same bits whatever else is in the batch. Knows no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unweight.gpu.decode import decode_words, how_to_decode, row_bases
from unweight.gpu.plans import Launch
from unweight.gpu.weight import DeviceTiles


class Workspace:
    """Memory of split sums on one device, for kernels that run one after the other on a stream.

    It grows when asked to, which must not be while a CUDA graph is captured: reserve before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sums = torch.empty(0, dtype=torch.float32, device=device)
        self.locks = torch.zeros(0, dtype=torch.int32, device=device)  # zero between kernels

    def reserve(self, *, num_sums: int, num_locks: int) -> None:
        """Room for that many float32 sums and locks."""
        if num_sums > len(self.sums):
            self.sums = torch.empty(num_sums, dtype=torch.float32, device=self._device)
        if num_locks > len(self.locks):
            self.locks = torch.zeros(num_locks, dtype=torch.int32, device=self._device)


def u12_matmul(
    x: Tensor,
    tiles: DeviceTiles,
    *,
    launch: Launch,
    split: int,
    workspace: Workspace,
    out: Tensor | None = None,
) -> Tensor:
    """x @ W.T, (M, N) bf16 or of the type of `out`, of x (M, K) bf16 with inputs side by side.

    Products are exact, sums in float32.
    `split` is the number of ranges that the inputs are summed in, and with the instruction set and
    the kind of tensor-core instruction (warps of 4 or more, or fewer) all that the order of an
    output's sum depends on. Rows of x at multiples of 32 bytes are read fastest. Where x is Inf or
    NaN, outputs are NaN that would be Inf in a dense product.
    """
    assert x.dtype == torch.bfloat16
    assert x.ndim == 2
    assert x.shape[1] == tiles.num_inputs
    assert x.stride(1) == 1
    num_rows, num_inputs = x.shape
    num_outputs, (num_blocks, num_tiles) = tiles.num_outputs, tiles.words.shape[:2]
    assert num_rows * x.stride(0) < 1 << 31
    y = x.new_empty(num_rows, num_outputs) if out is None else out
    if not num_rows:
        return y
    grid = (triton.cdiv(num_rows, launch.block_m), triton.cdiv(num_outputs, launch.block_n), split)
    if split > 1:
        workspace.reserve(num_sums=split * num_rows * num_outputs, num_locks=grid[0] * grid[1])
    how = how_to_decode(x.device)
    extra = {"launch_pdl": launch.early} if how else {}
    u12_matmul_kernel[grid](
        x, tiles.words, tiles.base, tiles.ptr, tiles.exceptions, y,
        workspace.sums, workspace.locks,
        num_rows, num_outputs, num_inputs, num_tiles, num_blocks, tiles.first_base,
        x.stride(0), y.stride(0),
        BN=launch.block_n, BM=launch.block_m, SPLIT=split,
        CHUNKS=triton.next_power_of_2(tiles.num_chunks),
        NIBBLES=tiles.nibbles, EVEN_K=num_inputs % 128 == 0, HOW=how, F32=not how,
        PDL=launch.early and how >= 90,
        num_warps=launch.warps, num_stages=launch.stages, **extra,
    )  # fmt: skip
    return y


@triton.jit
def _dot(w, x, acc, F32: tl.constexpr):
    # The interpreter's dot of bf16 operands is wrong (Triton 3.6): there both are widened first.
    if F32:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc)


@triton.jit
def _x_tile(x_p, k, rm, M, K, EVEN_K: tl.constexpr):
    """x of 128 inputs, (128, BM); zero where the batch or the matrix has ended."""
    if EVEN_K:
        return tl.load(x_p, mask=(rm < M)[None, :], other=0.0)
    else:
        return tl.load(x_p, mask=(rm < M)[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _listed(
    ptr_ptr, block, num_blocks, num_chunks, split, SPLIT: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Where a split's exceptions of a block begin and end, and where each chunk's do, (CHUNKS,)."""
    inside = block < num_blocks
    chunks = tl.arange(0, CHUNKS)
    own = ptr_ptr + tl.minimum(block, num_blocks - 1) * num_chunks
    ends = tl.load(own + 1 + tl.minimum(chunks, num_chunks - 1))
    ends = tl.where(chunks < num_chunks - 1, ends, 0x7FFFFFFF)
    first = tl.load(own + split * num_chunks // SPLIT)
    end = tl.load(own + (split + 1) * num_chunks // SPLIT)
    return first, tl.where(inside, end, first), ends


@triton.jit
def _columns(list_ptr, e, end, ends, block, n, LISTED: tl.constexpr):
    """Exceptions as further inputs: W (BN, LISTED) bf16, each value in its row; their k; which
    are there."""
    listed = e + tl.arange(0, LISTED)
    ok = listed < end
    word = tl.load(list_ptr + listed, mask=ok, other=0)
    chunk = tl.sum((listed[:, None] >= ends[None, :]).to(tl.int32), axis=1)
    row = block * 64 + ((word >> 10) & 63)
    value = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    mine = (n[:, None] == row[None, :]) & ok[None, :]
    w = tl.where(mine, value[None, :], 0.0).to(tl.bfloat16)
    return w, chunk * 1024 + (word & 1023), ok


@triton.jit
def _gather(x_ptr, k, ok, rm, M, x_stride):
    """x of the inputs k, (LISTED, BM)."""
    return tl.load(
        x_ptr + rm[None, :].to(tl.int64) * x_stride + k[:, None],
        mask=(rm < M)[None, :] & ok[:, None],
        other=0.0,
    )


@triton.jit
def store_sums(acc, y_ptr, part_ptr, lock_ptr, rm, n, M, N, y_stride, SPLIT: tl.constexpr):
    """Write y at rows rm and outputs n from sums (BN, BM) of all inputs, or of one of SPLIT ranges:
    those go through memory, and the last range to arrive adds all up, in their order."""
    inside = (rm < M)[None, :] & (n < N)[:, None]
    y_p = y_ptr + rm[None, :].to(tl.int64) * y_stride + n[:, None]
    if SPLIT == 1:
        tl.store(y_p, acc.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        part = part_ptr + rm[None, :].to(tl.int64) * N + n[:, None]
        tl.store(part + tl.program_id(2).to(tl.int64) * M * N, acc, mask=inside)
        tl.debug_barrier()
        lock = lock_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros(acc.shape, tl.float32)
            if acc.numel < 16384:  # all ranges are fetched at once
                for s in tl.static_range(SPLIT):
                    sums = part + tl.full((), s, tl.int64) * M * N
                    total += tl.load(sums, mask=inside, other=0.0, cache_modifier=".cg")
            else:  # which would be more than the registers hold
                for s in range(SPLIT):
                    sums = part + tl.full((), s, tl.int64) * M * N
                    total += tl.load(sums, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y_p, total.to(y_ptr.dtype.element_ty), mask=inside)
            tl.store(lock, 0)


@triton.jit(do_not_specialize=["M", "num_tiles", "num_blocks", "first_base"])
def u12_matmul_kernel(
    x_ptr, words_ptr, base_ptr, ptr_ptr, list_ptr, y_ptr, part_ptr, lock_ptr,
    M, N, K, num_tiles, num_blocks, first_base,
    x_stride, y_stride,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr,
    NIBBLES: tl.constexpr, EVEN_K: tl.constexpr, HOW: tl.constexpr, F32: tl.constexpr,
    PDL: tl.constexpr, LISTED: tl.constexpr = 32,
):  # fmt: skip
    """One block of BN outputs for BM rows of x, over one of SPLIT ranges of inputs."""
    pm, pn, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_chunks = tl.cdiv(num_tiles, 8)
    tile_0 = ps * num_tiles // SPLIT
    steps = (ps + 1) * num_tiles // SPLIT - tile_0

    rw = tl.arange(0, 16)
    rm = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    block = tl.minimum(n // 64, num_blocks - 1)
    own = pn * BN // 64
    p = words_ptr + (own.to(tl.int64) * num_tiles + tile_0) * 3072
    word = ((block - own) * (num_tiles * 3072) + n % 64 * 16)[:, None] + rw[None, :]
    k = tile_0 * 128 + tl.arange(0, 128)
    x_p = x_ptr + tile_0 * 128
    x_at = rm[None, :] * x_stride + tl.arange(0, 128)[:, None]

    # 2 ** (base - 112), whose exponent field is base + 15.
    scale = (row_bases(base_ptr, block * 64 + n % 64, first_base, NIBBLES) + 15) << 23
    first, end, ends = _listed(ptr_ptr, own, num_blocks, num_chunks, ps, SPLIT, CHUNKS)
    if PDL:
        # What came before, the weights, does not depend on the kernel before; x and y may.
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(steps):
        w0, w1, w2, w3, w4, w5, w6, w7 = decode_words(
            tl.load(p + word), tl.load(p + 1024 + word), tl.load(p + 2048 + word), HOW
        )
        # Joined in the order of bits, last axis first: slot % 2, slot // 2 % 2, slot // 4.
        w = tl.join(
            tl.join(tl.join(w0, w4), tl.join(w2, w6)),
            tl.join(tl.join(w1, w5), tl.join(w3, w7)),
        )
        w = tl.reshape(tl.permute(w, (0, 2, 3, 4, 1)), (BN, 128))
        acc = _dot(w, _x_tile(x_p + x_at, k, rm, M, K, EVEN_K), acc, F32)
        p += 3072
        x_p += 128
        k += 128

    acc = acc * scale.to(tl.float32, bitcast=True)[:, None]
    for e in range(first, end, LISTED):
        w, ke, ok = _columns(list_ptr, e, end, ends, own, n, LISTED)
        acc = _dot(w, _gather(x_ptr, ke, ok, rm, M, x_stride), acc, F32)
    for h in tl.static_range(1, (BN + 63) // 64):
        own = pn * BN // 64 + h
        first, end, ends = _listed(ptr_ptr, own, num_blocks, num_chunks, ps, SPLIT, CHUNKS)
        for e in range(first, end, LISTED):
            w, ke, ok = _columns(list_ptr, e, end, ends, own, n, LISTED)
            acc = _dot(w, _gather(x_ptr, ke, ok, rm, M, x_stride), acc, F32)

    store_sums(acc, y_ptr, part_ptr, lock_ptr, rm, n, M, N, y_stride, SPLIT)
