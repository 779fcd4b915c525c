"""The fused kernel's twin in BF16: the same programs, with weights that need no decoding.

What decoding costs, and what fewer bytes gain, is the difference between the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unweight.gpu.matmul import Workspace, store_sums
from unweight.gpu.plans import Launch


@triton.jit(do_not_specialize=["M", "num_tiles"])
def bf16_matmul_kernel(
    x_ptr, weights_ptr, y_ptr, part_ptr, lock_ptr,
    M, N, K, num_tiles, x_stride, y_stride,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, F32: tl.constexpr,
):  # fmt: skip
    """One block of BN outputs for BM rows of x, over one of SPLIT ranges of inputs; K is a multiple
    of 128, N of BN."""
    pm, pn, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_0 = ps * num_tiles // SPLIT
    steps = (ps + 1) * num_tiles // SPLIT - tile_0
    rm = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)
    p = weights_ptr + (pn * BN).to(tl.int64) * K + tile_0 * 128
    weights_at = tl.arange(0, BN)[:, None] * K + k[None, :]
    x_p = x_ptr + tile_0 * 128
    x_at = rm[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(steps):
        w = tl.load(p + weights_at)
        x = tl.load(x_p + x_at, mask=(rm < M)[None, :], other=0.0)
        if F32:
            acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, x, acc)
        p += 128
        x_p += 128
    store_sums(acc, y_ptr, part_ptr, lock_ptr, rm, n, M, N, y_stride, SPLIT)


def bf16_matmul(
    x: Tensor,
    weights: Tensor,
    *,
    launch: Launch,
    split: int,
    workspace: Workspace,
    out: Tensor,
) -> Tensor:
    """x @ W.T of x (M, K) and W (N, K) bf16 into out (M, N)."""
    (num_rows, num_inputs), num_outputs = x.shape, len(weights)
    assert num_inputs % 128 == 0
    assert num_outputs % launch.block_n == 0
    grid = (triton.cdiv(num_rows, launch.block_m), num_outputs // launch.block_n, split)
    if split > 1:
        workspace.reserve(num_sums=split * num_rows * num_outputs, num_locks=grid[0] * grid[1])
    bf16_matmul_kernel[grid](
        x, weights, out, workspace.sums, workspace.locks,
        num_rows, num_outputs, num_inputs, num_inputs // 128, x.stride(0), out.stride(0),
        BN=launch.block_n, BM=launch.block_m, SPLIT=split, F32=x.device.type != "cuda",
        num_warps=launch.warps, num_stages=stages(launch),
    )  # fmt: skip
    return out


def stages(launch: Launch) -> int:
    """As many as there, or as the larger tiles leave room for."""
    tile_bytes = 128 * 2 * (launch.block_n + launch.block_m)
    return max(2, min(launch.stages, (220 << 10) // tile_bytes))


def torch_matmul(x: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """What everybody has."""
    return torch.mm(x, weights.T, out=out)
