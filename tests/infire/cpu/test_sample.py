"""The sampling kernel: its candidates against a sort, its ids against torch and plain numpy."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infire.kernels.draw import uniform
from infire.native.sampler import CANDIDATES_BYTES
from infire.plan import RowResult, SlotOpen
from tests.infire.cpu.sampling import (
    Kernel,
    Logits,
    Sampling,
    by_torch,
    instruction_sets,
    opened,
    row,
)

SIZES = [1, 15, 16, 33, 100, 1000, 5003]


@pytest.fixture(scope="module", params=instruction_sets())
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(tmp_path_factory.getbasetemp(), request.param)


# --- candidates ---------------------------------------------------------------------------------


def rows_of(size: int) -> dict[str, Logits]:
    chance = np.random.default_rng(size)
    plain = chance.normal(size=size).astype(np.float32)
    broken = plain.copy()
    broken[chance.random(size) < 0.3] = np.nan
    broken[chance.random(size) < 0.1] = np.inf
    broken[chance.random(size) < 0.3] = -np.inf
    return {
        "random": plain,
        "rising": np.sort(plain),
        "falling": np.sort(plain)[::-1].copy(),
        "ties": np.round(plain).astype(np.float32),  # zeros of both signs among them
        "equal": np.full(size, -2.5, np.float32),
        "broken": broken,
        "nothing": np.full(size, np.nan, np.float32),
        "lowest": np.full(size, -np.inf, np.float32),
    }


def in_order(logits: Logits) -> NDArray[np.int64]:
    """All ids, the likeliest first and of equals the lowest."""
    most = np.finfo(np.float32).max
    clean = np.nan_to_num(logits, nan=-most, posinf=most, neginf=-most)
    return np.lexsort((np.arange(len(logits)), -clean))


def test_python_knows_how_large_candidates_are(kernel: Kernel) -> None:
    assert kernel.candidates_bytes == CANDIDATES_BYTES


@pytest.mark.parametrize("limit", [1, 2, 5, 63, 64])
@pytest.mark.parametrize("size", SIZES)
def test_candidates_are_the_first_of_a_sort(kernel: Kernel, size: int, limit: int) -> None:
    chance = random.Random(size * 100 + limit)
    for name, logits in rows_of(size).items():
        for width in (16, 32, 64):
            tiles = list(range(-(-size // width)))
            for shuffled in (False, True):
                if shuffled:
                    chance.shuffle(tiles)
                ids, values = kernel.best(logits, limit, width=width, tiles=tiles)
                assert ids.tolist() == in_order(logits)[:limit].tolist(), (name, width, shuffled)
                assert np.isfinite(values).all()


# --- ids ----------------------------------------------------------------------------------------


def knobs(chance: random.Random, size: int) -> dict[str, Any]:
    def bias() -> tuple[tuple[int, float], ...]:
        return tuple((chance.randrange(size), chance.uniform(-3, 3)) for _ in range(4))

    return {
        "seed": chance.choice((0, 5, 2**63 + 1, -7, chance.getrandbits(40))),
        "temperature": chance.choice((0.0, 1e-6, 0.3, 1.0, 1.7)),
        "top_k": chance.choice((0, 0, 3, 64, 65, 700, 10**6)),
        "top_p": chance.choice((1.0, 1.0, 0.92, 0.4, 0.0, 0.9999)),
        "min_p": chance.choice((0.0, 0.0, 0.2, 1e-3, 1e-7, 1.0)),
        "repetition_penalty": chance.choice((1.0, 1.0, 1.0, 1.3, 0.8)),
        "frequency_penalty": chance.choice((0.0, 0.0, 0.0, 0.7, -0.4)),
        "presence_penalty": chance.choice((0.0, 0.0, 0.0, 0.9, -0.5)),
        "logit_bias": chance.choice(((), (), (), bias())),
        "logprobs": chance.choice((None, None, None, 0, 1, min(20, size))),
    }


def requests(count: int, size: int, seed: int) -> list[SlotOpen]:
    """One in each of the first slots."""
    chance = random.Random(seed)
    return [
        opened(
            slot,
            prompt=chance.choices(range(size), k=chance.randint(1, 50)),
            output=chance.choices(range(size), k=chance.randint(0, 50)),
            **knobs(chance, size),
        )
        for slot in range(count)
    ]


def likely(logits: Logits, request: SlotOpen) -> set[int]:
    """What plain numpy draws, in double precision; several where rounding decides."""
    asked = request.sampling
    values = logits.astype(np.float64)
    for token_id, bias in asked.logit_bias:
        values[token_id] += bias
    seen = np.unique(np.array(request.token_ids, np.int64))
    r = asked.repetition_penalty
    values[seen] = np.where(values[seen] > 0, values[seen] / r, values[seen] * r)
    said = np.bincount(
        np.array(request.token_ids[request.num_prompt :], np.int64), minlength=len(values)
    )
    values -= asked.frequency_penalty * said + asked.presence_penalty * (said > 0)
    order = np.lexsort((np.arange(len(values)), -values))
    if asked.temperature < 1e-5:
        return {int(order[0])}
    weights = np.exp((values - values.max()) / asked.temperature)
    number = uniform(asked.seed, position_of(request))
    return {
        drawn(weights, order, number + shift, request, asked.top_p + cut)
        for shift in (-1e-6, 0, 1e-6)
        for cut in (-1e-6, 0, 1e-6)
    }


def drawn(
    weights: NDArray[np.float64],
    order: NDArray[np.int64],
    number: float,
    request: SlotOpen,
    top_p: float,
) -> int:
    asked = request.sampling
    first = order[: asked.top_k or None]
    sums = weights[first].cumsum()
    kept = np.ones(len(first), bool)
    if asked.top_p < 1:
        kept &= sums - weights[first] < top_p * sums[-1]
    kept &= weights[first] >= asked.min_p
    kept[0] = True
    ids = np.sort(first[kept])
    sums = weights[ids].cumsum()
    found = int(np.searchsorted(sums, max(number, 0) * sums[-1], side="right"))
    return int(ids[min(found, len(ids) - 1)])


def position_of(request: SlotOpen) -> int:
    return 100 + request.slot


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", SIZES)
def test_all_knobs_are_as_torch_and_numpy_say(kernel: Kernel, size: int, seed: int) -> None:
    batch = requests(64, size, seed)
    chance = np.random.default_rng(seed)
    spread = chance.choice([0.3, 2.0, 6.0], (64, 1))
    logits = (chance.normal(size=(64, size)) * spread).astype(np.float32)
    check(kernel, batch, logits)


@pytest.mark.parametrize("knob", [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.02}], ids=str)
def test_rows_of_a_real_vocabulary_are_as_torch_and_numpy_say(
    kernel: Kernel, knob: dict[str, Any]
) -> None:
    chance = np.random.default_rng(3)
    spread = np.array([[0.0], [1.0], [3.0], [3.0], [5.0]])
    logits = (chance.normal(size=(5, 49_152)) * spread).astype(np.float32)
    check(kernel, [opened(slot, seed=slot, logprobs=None, **knob) for slot in range(5)], logits)


def check(kernel: Kernel, batch: list[SlotOpen], logits: Logits) -> None:
    ours = Sampling(kernel, logits.shape[1])
    ours.open(*batch)
    positions = [position_of(request) for request in batch]
    pairs = zip(batch, positions, strict=True)
    found = ours.step([row(request.slot, position) for request, position in pairs], logits)
    by_reference = by_torch(batch, positions, logits)
    certain = 0
    for n, (request, mine, other) in enumerate(zip(batch, found, by_reference, strict=True)):
        possible = likely(logits[n], request)
        certain += len(possible) == 1
        assert set(mine.ids) <= possible, request
        if len(possible) == 1:
            assert mine.ids == other.ids, request
        if mine.ids == other.ids:
            same_logprobs(mine, other)
    assert certain >= 0.75 * len(batch)  # a share of an id in 49,152 is hardly wider than the edge


def same_logprobs(mine: RowResult, other: RowResult) -> None:
    assert len(mine.logprobs) == len(other.logprobs)
    for ours, theirs in zip(mine.logprobs, other.logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-5, abs=1e-5)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
        values = [value for _, value in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx(values, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {},
        {"top_p": 0.9},
        {"top_k": 2},
        {"min_p": 0.1, "logprobs": 3},
        {"repetition_penalty": 1.5, "prompt": [0, 2]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_taken_as_torch_takes_them(
    kernel: Kernel, sampling: dict[str, Any]
) -> None:
    nan, inf = math.nan, math.inf
    logits = np.array(
        [[1, 2, 0], [nan] * 3, [nan, 1, -inf], [-inf] * 3, [inf, 0, inf], [0, -0.0, nan]],
        np.float32,
    )
    batch = [opened(slot, seed=slot, **sampling) for slot in range(6)]
    ours = Sampling(kernel, 3)
    ours.open(*batch)
    for position in range(5):
        found = ours.step([row(slot, position + 1) for slot in range(6)], logits)
        if "prompt" not in sampling:
            ids = [result.ids for result in by_torch(batch, [position + 1] * 6, logits)]
            assert [result.ids for result in found] == ids
        assert all(math.isfinite(each.logprob) for result in found for each in result.logprobs)
        assert found[2].ids == (1,)
