"""The parts of a decoder, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infire.kv_cache import KVCache
from infire.model.config import RopeConfig
from infire.model.layers import Linear, RMSNorm, RopeTable
from infire.plan import Row, SlotOpen, StepPlan
from infire.request import SamplingParams
from infire.runner import ModelRunner
from tests.infire.driving import loaded
from tests.infire.small_models import VOCABULARY, make_folder


def test_a_rotation_turns_each_pair_by_its_own_angle() -> None:
    """A head of 4 at position 3, theta 100: the pairs (0, 2) by 3 and (1, 3) by 0.3 radians."""
    table = RopeTable(RopeConfig(theta=100.0), 4, num_tokens=8, like=torch.zeros(1))
    found = table.at(torch.tensor([3]))(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]))
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    assert found.flatten().tolist() == pytest.approx(expected)


def test_what_two_rotated_heads_have_in_common_depends_on_their_distance() -> None:
    table = RopeTable(RopeConfig(theta=10_000.0), 16, num_tokens=200, like=torch.zeros(1))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16)

    def product(of_q: int, of_k: int) -> float:
        rotated_q = table.at(torch.tensor([of_q]))(q)
        return float((rotated_q * table.at(torch.tensor([of_k]))(k)).sum())

    assert product(9, 4) == pytest.approx(product(190, 185), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_worked_out_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 300) * 100).to(dtype), torch.rand(300).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = exact * weight.double()
    found = RMSNorm(weight, 1e-5)(x)
    assert found.dtype == dtype
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=0.6 * spacing + 1e-6, atol=0)


@dataclass(frozen=True, slots=True)
class CountingHead(Linear):
    """Keeps how many rows it was given each time."""

    rows: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super(CountingHead, self).__call__(x)


def test_logits_are_computed_for_tokens_whose_successor_is_wanted(tmp_path: Path) -> None:
    whole = loaded(make_folder("llama", tmp_path), block_tokens=8)
    head = CountingHead(whole.runner._model.head.weight)
    model = replace(whole.runner._model, head=head)
    cache = KVCache(whole.layout, [8], torch.device("cpu"))
    runner = ModelRunner(model, cache, num_slots=4, max_tokens=64)

    def prompt(slot: int, num_tokens: int, *, sample: bool) -> tuple[SlotOpen, Row]:
        ids = tuple(n % VOCABULARY for n in range(num_tokens))
        sampling = SamplingParams(max_tokens=4, seed=0)
        opened = SlotOpen(slot=slot, token_ids=ids, num_prompt=num_tokens, sampling=sampling)
        blocks = ((2 * slot, 2 * slot + 1),)
        row = Row(slot=slot, start=0, num_new=num_tokens, ids=ids, new_blocks=blocks, sample=sample)
        return opened, row

    three = [prompt(0, 9, sample=True), prompt(1, 5, sample=False), prompt(2, 16, sample=True)]
    opens, rows = zip(*three, strict=True)
    runner.run(StepPlan(step=1, opens=opens, rows=rows))
    runner.run(StepPlan(step=2, opens=opens[1:2], rows=rows[1:2]))
    assert head.rows == [2]
