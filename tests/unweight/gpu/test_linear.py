"""A matrix in each of its places, by each of its pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.unweight.gpu.matrices import DEVICE, as_tensor, bits, gaussian
from unweight.bundle import BadChecksum
from unweight.gpu.linear import Linear, new_scratch
from unweight.gpu.plans import BUCKETS, Choice, Launch, Pipeline, ShapePlan
from unweight.gpu.rest import Resting
from unweight.gpu.weight import to_device
from unweight.tiles import pack_tiles

SHAPE = (192, 640)


def plan() -> ShapePlan:
    """Fused up to 16 rows, decoded beyond."""
    launch = Launch(block_n=64, block_m=16, warps=4, stages=2, early=False)
    fused = Choice(pipeline=Pipeline.FUSED, launch=launch)
    decoded = Choice(pipeline=Pipeline.DECODED, launch=None)
    return ShapePlan(split=1, choices={size: fused if size == 16 else decoded for size in BUCKETS})


def x_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, SHAPE[1], generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.fixture
def weights() -> Tensor:
    return as_tensor(gaussian(*SHAPE))


@pytest.fixture
def packed(weights: Tensor) -> Linear:
    return Linear(to_device(pack_tiles(bits(weights)), DEVICE), plan(), new_scratch(DEVICE))


def test_many_rows_are_the_dense_product_bit_for_bit(weights: Tensor, packed: Linear) -> None:
    x = x_of(20).to(DEVICE)
    dense = Linear(weights, plan(), new_scratch(DEVICE))
    assert torch.equal(packed(x), dense(x))
    out = torch.empty(20, SHAPE[0], dtype=torch.bfloat16, device=DEVICE)
    assert packed(x, out=out) is out
    assert torch.equal(out, dense(x))


def test_few_rows_are_near_it(weights: Tensor, packed: Linear) -> None:
    x = x_of(3).to(DEVICE)
    expected = x.double() @ weights.double().T
    error = (packed(x).double() - expected).norm() / expected.norm()
    assert error < 0.01  # bf16's rounding, and the interpreter truncates


@pytest.mark.slow
def test_asleep_it_computes_the_same(packed: Linear) -> None:
    few, many, ids = x_of(3).to(DEVICE), x_of(20).to(DEVICE), torch.tensor([5, 0, 191]).to(DEVICE)
    before = packed(few), packed(many), packed.rows(ids)
    packed.sleep()
    assert packed.asleep
    asleep = packed(few), packed(many), packed.rows(ids)
    packed.wake()
    assert not packed.asleep
    awake = packed(few), packed(many), packed.rows(ids)
    for one, other, another in zip(before, asleep, awake, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def test_rows_are_the_matrix_in_any_place(weights: Tensor, packed: Linear) -> None:
    ids = torch.tensor([5, 0, 191]).to(DEVICE)
    dense = Linear(weights, plan(), new_scratch(DEVICE))
    assert torch.equal(packed.rows(ids), dense.rows(ids))


def test_at_rest_it_is_two_thirds(weights: Tensor) -> None:
    tiles = to_device(pack_tiles(bits(weights)), DEVICE)
    assert Resting.of(tiles, threads=2).num_bytes < 0.70 * weights.nbytes


def test_a_damaged_frame_is_named(weights: Tensor) -> None:
    sm = np.zeros(640, np.uint8)
    resting = Resting([(sm, sm[:9])], (1, 640), device=DEVICE, threads=1)
    with pytest.raises(BadChecksum, match="chunk 0"):
        resting.wake()
