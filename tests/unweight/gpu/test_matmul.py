"""The fused product against float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.unweight.gpu.matrices import DEVICE, as_tensor, bits, gaussian, hard
from unweight.gpu.matmul import Workspace, u12_matmul
from unweight.gpu.plans import Launch
from unweight.gpu.weight import DeviceTiles, to_device
from unweight.tiles import pack_tiles


def launch(block_n: int, block_m: int, warps: int = 4) -> Launch:
    return Launch(block_n=block_n, block_m=block_m, warps=warps, stages=2, early=False)


def tiles_of(weights: Tensor) -> DeviceTiles:
    packed = pack_tiles(bits(weights), max_exception_share=1, max_size_share=1e9)
    return to_device(packed, DEVICE)


def rows_of_x(num_rows: int, num_inputs: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_inputs, generator=generator).bfloat16().to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "num_rows", "started", "split"),
    [
        ((64, 128), 1, launch(64, 16), 1),
        ((256, 2048), 5, launch(128, 16), 2),
        ((130, 600), 40, launch(128, 32), 2),  # one chunk of exceptions, no half of a tile
        ((100, 1100), 17, launch(32, 16), 1),
        ((65, 2176), 3, launch(64, 16), 4),  # more ranges than chunks
        ((70, 384), 70, launch(256, 64, 8), 1),
    ],
    ids=str,
)
def test_products_are_those_of_the_matrix(
    shape: tuple[int, int], num_rows: int, started: Launch, split: int
) -> None:
    weights = as_tensor(hard(*shape))
    x = rows_of_x(num_rows, shape[1])
    y = torch.full((num_rows, shape[0]), float("nan"), device=DEVICE)  # float32: the bare sums
    workspace = Workspace(DEVICE)
    for _ in range(2):  # the second finds the locks of the first open again
        u12_matmul(x, tiles_of(weights), launch=started, split=split, workspace=workspace, out=y)
    expected = x.double() @ weights.double().T
    magnitudes = x.double().abs() @ weights.double().abs().T
    assert ((y.double() - expected).abs() <= 1e-6 * magnitudes).all()
    assert not workspace.locks.any()


def test_a_row_is_the_same_bits_in_any_batch_and_launch() -> None:
    weights = tiles_of(as_tensor(hard(192, 2048)))
    x = rows_of_x(33, 2048)
    workspace = Workspace(DEVICE)

    def product(rows: Tensor, started: Launch) -> Tensor:
        return u12_matmul(rows, weights, launch=started, split=2, workspace=workspace)

    alone = product(x[7:8].contiguous(), launch(64, 16))
    assert torch.equal(product(x, launch(64, 64))[7:8], alone)
    assert torch.equal(product(x, launch(128, 32))[7:8], alone)
    assert torch.equal(product(x[:12].contiguous(), launch(32, 16))[7:8], alone)


def test_rows_of_zeros_give_zero() -> None:
    weights = gaussian(64, 256)
    weights[3], weights[4] = 0, 0x8000
    y = u12_matmul(
        rows_of_x(4, 256),
        tiles_of(as_tensor(weights)),
        launch=launch(64, 16),
        split=1,
        workspace=Workspace(DEVICE),
    )
    assert not y[:, 3:5].any()
    assert y[:, :3].all()


def test_bases_in_bytes_and_in_nibbles() -> None:
    weights = gaussian(128, 256)
    narrow = pack_tiles(weights)
    weights[64:] = weights[64:] - (30 << 7)  # 2 ** -30 of what they were
    wide = pack_tiles(weights)
    assert (len(narrow.base), len(wide.base)) == (64, 128)
    x = rows_of_x(2, 256)
    y = torch.empty(2, 128, device=DEVICE)
    started = launch(64, 16)
    u12_matmul(
        x, to_device(wide, DEVICE), launch=started, split=1, workspace=Workspace(DEVICE), out=y
    )
    magnitudes = x.double().abs() @ as_tensor(weights).double().abs().T
    expected = x.double() @ as_tensor(weights).double().T
    assert ((y.double() - expected).abs() <= 1e-6 * magnitudes).all()


def test_no_rows_are_no_work() -> None:
    weights = tiles_of(as_tensor(gaussian(64, 128)))
    y = u12_matmul(
        rows_of_x(0, 128), weights, launch=launch(64, 16), split=4, workspace=Workspace(DEVICE)
    )
    assert y.shape == (0, 64)
