"""Masks in both samplers: as if what they forbid did not exist, but for log probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infire.plan import RowResult, SlotOpen
from infire.sampler import Sampler
from tests.infire.cpu.sampling import Kernel, Logits, Sampling, opened, row

VOCABULARY = 200
Sample = Callable[[Sequence[SlotOpen], Logits, Sequence[NDArray[np.int32] | None]], list[RowResult]]
KNOBS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 5.0},
    {"temperature": 0.01},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 150},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": ((3, 100.0), (70, 5.0))},
    {"temperature": 0.0, "logprobs": 4},
    {"temperature": 1.0, "logprobs": 0, "top_k": 20, "frequency_penalty": 1.0},
]


def by_torch(
    requests: Sequence[SlotOpen], logits: Logits, masks: Sequence[NDArray[np.int32] | None]
) -> list[RowResult]:
    sampler = Sampler(vocab_size=logits.shape[1], num_slots=64, device=torch.device("cpu"))
    for request, mask in zip(requests, masks, strict=True):
        sampler.open(request, mask)
    slots = [request.slot for request in requests]
    return sampler.sample(torch.from_numpy(logits.copy()), slots, [9] * len(slots))


@pytest.fixture(scope="module", params=["torch", "native"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    if request.param == "torch":
        return by_torch
    kernel = Kernel(tmp_path_factory.getbasetemp(), "native")

    def by_kernel(
        requests: Sequence[SlotOpen], logits: Logits, masks: Sequence[NDArray[np.int32] | None]
    ) -> list[RowResult]:
        sampling = Sampling(kernel, logits.shape[1])
        for each, mask in zip(requests, masks, strict=True):
            sampling.sampler.open(each, mask)
        return sampling.step([row(each.slot, 9) for each in requests], logits)

    return by_kernel


def mask_of(ids: Sequence[int], size: int = VOCABULARY) -> NDArray[np.int32]:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def some_logits(seed: int, count: int = 1) -> Logits:
    return np.random.default_rng(seed).normal(0, 3, (count, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("num_allowed", [1, 2, 40, 199])
def test_what_is_forbidden_might_as_well_not_exist(
    sample: Sample, knobs: dict[str, Any], num_allowed: int
) -> None:
    """The ids that the allowed ones get by themselves, from a vocabulary of nothing else."""
    chance = np.random.default_rng(num_allowed)
    allowed = np.sort(chance.choice(VOCABULARY, num_allowed, replace=False))
    place = {int(token_id): n for n, token_id in enumerate(allowed)}
    own = {**knobs, "logprobs": None}
    if "logit_bias" in knobs:
        own["logit_bias"] = tuple((place[i], it) for i, it in knobs["logit_bias"] if i in place)
    said = [int(allowed[0])]
    for seed in range(20):
        logits = some_logits(seed)
        request = opened(prompt=said, output=said, seed=seed, **knobs)
        (masked,) = sample([request], logits, [mask_of(allowed)])
        alone = opened(prompt=[0], output=[0], seed=seed, **own)
        if num_allowed == 1:
            assert masked.ids == tuple(said)
            continue
        (expected,) = sample([alone], np.ascontiguousarray(logits[:, allowed]), [None])
        assert place[masked.ids[0]] == expected.ids[0]


def test_log_probabilities_are_of_all(sample: Sample) -> None:
    logits = some_logits(1)
    request = opened(temperature=0.0, logprobs=3)
    (masked,) = sample([request], logits, [mask_of([5])])
    (plain,) = sample([request], logits, [None])
    assert masked.ids == (5,)
    (told,) = masked.logprobs
    assert told.top == plain.logprobs[0].top
    expected = logits[0, 5] - math.log(np.exp(logits[0].astype(np.float64)).sum())
    assert told.logprob == pytest.approx(expected, abs=1e-4)


def test_neighbours_are_not_masked(sample: Sample) -> None:
    logits = some_logits(2, 12)
    requests = [opened(slot=n, seed=n, temperature=0.8, top_k=30 * (n % 2)) for n in range(12)]
    masks = [mask_of([n, 199 - n]) if n % 3 == 0 else None for n in range(12)]
    together = sample(requests, logits, masks)
    for n, (request, mask) in enumerate(zip(requests, masks, strict=True)):
        assert sample([request], logits[n : n + 1], [mask]) == [together[n]]
        if mask is not None:
            assert together[n].ids[0] in {n, 199 - n}


def test_a_slot_that_is_opened_again_without_a_mask_has_none() -> None:
    sampler = Sampler(vocab_size=VOCABULARY, num_slots=2, device=torch.device("cpu"))
    logits = torch.from_numpy(some_logits(3))
    sampler.open(opened(temperature=0.0), mask_of([7]))
    assert sampler.sample(logits, [0], [1])[0].ids == (7,)
    sampler.open(opened(temperature=0.0))
    assert sampler.sample(logits, [0], [1])[0].ids == (int(logits.argmax()),)
