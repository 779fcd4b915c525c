"""The products, norms and look-ups of a step against torch, on odd shapes, for each build."""

from __future__ import annotations

from ctypes import Structure

import numpy as np
import pytest
import torch
from torch import Tensor

from infire.kernels.cpu.embed import embed_reference
from infire.kernels.cpu.library import (
    EmbedArgs,
    HeadArgs,
    Kind,
    LinearArgs,
    NormArgs,
    SiluArgs,
    Step,
    Tape,
    address,
    aligned,
)
from infire.kernels.cpu.linear import head_reference, linear_reference
from infire.kernels.cpu.norm import norm_reference
from infire.kernels.cpu.silu import silu_reference
from tests.infire.cpu.kernels import (
    MARCHES,
    Packed,
    bits,
    inputs,
    library,
    no_inputs,
    number,
    rows,
    tensor,
)

SHAPES = [(1, 1), (16, 8), (17, 9), (100, 63), (960, 576), (33, 2100)]  # (outputs, inputs)
ROWS = (1, 2, 3, 4, 5, 7, 12, 13, 32, 33, 100)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def weights(num_outputs: int, num_inputs: int) -> Tensor:
    """With what 12 bits cannot say: outliers, subnormals, zeros of both signs."""
    weight = normal(num_outputs, num_inputs, scale=0.05)
    odd = torch.tensor([1e4, -3e-20, 1e-39, 0.0, -0.0]).bfloat16()
    places = torch.randint(weight.numel(), (max(5, weight.numel() // 500),))
    weight.view(-1)[places] = odd[torch.arange(len(places)) % len(odd)]
    return weight


def run(march: str, kind: Kind, args: Structure, threads: int = 2) -> None:
    library(march).run(Tape([(kind, args)]), num_threads=threads)


def product(march: str, packed: Packed, x: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
    read, count = inputs(march, x), number(len(x))
    y = aligned(len(x), -(-size // 32) * 32, dtype=np.uint16)
    padded = rows(bias[None]) if bias is not None else None
    args = LinearArgs(
        num_rows=address(count),
        weight=address(packed.matrix),
        bias=address(padded),
        x=address(read),
        ld_x=read.shape[1],
        y=address(y),
        ld_y=y.shape[1],
    )
    run(march, Kind.LINEAR, args)
    return tensor(y, size)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("form", ["bf16", "u12"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int], form: str, march: str) -> None:
    torch.manual_seed(1)
    weight, x, bias = weights(*shape), normal(100, shape[1]), normal(shape[0])
    packed = Packed(weight, form)
    found = product(march, packed, x, shape[0], bias)
    expected = linear_reference(x.double(), weight.double(), bias.double())
    bound = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert ((found.double() - expected).abs() <= bound * 2**-8).all()


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_result_is_the_same_in_any_company_and_in_12_bits(
    shape: tuple[int, int], march: str
) -> None:
    torch.manual_seed(2)
    weight, x = weights(*shape), normal(max(ROWS), shape[1])
    plain, packed = Packed(weight, "bf16"), Packed(weight, "u12")
    whole = bits(product(march, plain, x, shape[0]))
    for count in ROWS:
        for form in (plain, packed):
            assert np.array_equal(bits(product(march, form, x[:count], shape[0])), whole[:count])


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("form", ["bf16", "u12"])
def test_embeddings_are_the_rows_of_the_table(form: str, march: str) -> None:
    torch.manual_seed(3)
    table = weights(211, 72)
    ids = torch.randint(211, (37,), dtype=torch.int32)
    step = Step(num_tokens=len(ids), token_ids=address(ids.numpy()))
    packed, out = Packed(table, form), aligned(len(ids), 96, dtype=np.uint16)
    args = EmbedArgs(step=address(step), table=address(packed.matrix), out=address(out), ld_out=96)
    run(march, Kind.EMBED, args)
    assert np.array_equal(out[:, :72], bits(embed_reference(ids, table)))


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("size", [1, 16, 63, 576])
@pytest.mark.parametrize("adds", [False, True])
def test_norms(size: int, adds: bool, march: str) -> None:
    torch.manual_seed(4)
    x, delta, weight = normal(9, size, scale=30), normal(9, size), normal(size)
    total, expected = norm_reference(x, delta if adds else None, weight, 1e-5)
    ours, added, scales, count = rows(x), rows(delta), rows(weight[None]), number(9)
    out = no_inputs(march, 9, size)
    args = NormArgs(
        num_rows=address(count),
        index=None,
        x=address(ours),
        delta=address(added) if adds else None,
        ld_x=ours.shape[1],
        weight=address(scales),
        eps=1e-5,
        size=size,
        out=address(out),
        ld_out=out.shape[1],
        keep=1,
    )
    run(march, Kind.NORM, args)
    torch.testing.assert_close(tensor(out, size), expected, rtol=2**-7, atol=0)
    assert np.array_equal(ours[:, :size], bits(total))


def test_a_norm_of_some_rows_leaves_what_it_reads() -> None:
    torch.manual_seed(5)
    x, delta, weight = normal(9, 40), normal(9, 40), normal(40)
    index, count = np.array([7, 2], np.int32), number(2)
    ours, added, scales = rows(x), rows(delta), rows(weight[None])
    before, out = ours.copy(), no_inputs("native", 2, 40)
    args = NormArgs(
        num_rows=address(count),
        index=address(index),
        x=address(ours),
        delta=address(added),
        ld_x=64,
        weight=address(scales),
        eps=1e-5,
        size=40,
        out=address(out),
        ld_out=64,
        keep=0,
    )
    run("native", Kind.NORM, args)
    _, expected = norm_reference(x[[7, 2]], delta[[7, 2]], weight, 1e-5)
    torch.testing.assert_close(tensor(out, 40), expected, rtol=2**-7, atol=0)
    assert np.array_equal(ours, before)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("size", [1, 17, 100, 1536])
def test_gates(size: int, march: str) -> None:
    torch.manual_seed(6)
    gate_up = normal(11, 2 * size, scale=8)
    gate_up[0, 0], gate_up[1, 0] = -200.0, 200.0  # where e^x leaves the floats
    ours, count = rows(gate_up), number(11)
    out = no_inputs(march, 11, size)
    args = SiluArgs(
        num_rows=address(count),
        x=address(ours),
        ld_x=ours.shape[1],
        size=size,
        out=address(out),
        ld_out=out.shape[1],
    )
    run(march, Kind.SILU, args)
    expected = silu_reference(gate_up)
    torch.testing.assert_close(tensor(out, size), expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_written_for_those_who_ask_and_no_others(march: str, threads: int) -> None:
    torch.manual_seed(7)
    weight, x = normal(1003, 72, scale=0.1), normal(5, 72)
    limits = np.array([0, 1, 0, 40, 0], np.int64)
    packed, read, count = Packed(weight, "u12"), inputs(march, x), number(5)
    logits = np.full((5, 1003), 77.0, np.float32)
    candidates = aligned(threads * 5 * 1088, dtype=np.uint8)
    args = HeadArgs(
        num_rows=address(count),
        weight=address(packed.matrix),
        x=address(read),
        ld_x=read.shape[1],
        vocabulary=1003,
        limits=address(limits),
        logits=address(logits),
        candidates=address(candidates),
    )
    run(march, Kind.HEAD, args, threads)
    expected = head_reference(x, weight)
    asked = limits == 0
    torch.testing.assert_close(
        torch.from_numpy(logits[asked]), expected[asked], rtol=1e-4, atol=1e-4
    )
    assert (logits[~asked] == 77.0).all()
