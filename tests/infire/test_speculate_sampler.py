"""Drafts in the sampler: what comes out is what would come out one id at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from infire.plan import RowResult, SlotOpen
from infire.request import SamplingParams
from infire.sampler import Sampler

VOCABULARY = 7  # so few that a draft at random is often right
KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "filtered": {"temperature": 1.2, "top_k": 4, "top_p": 0.9},
    "penalties": {
        "temperature": 0.7,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.8,
        "presence_penalty": 0.3,
    },
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "logprobs": {"temperature": 1.0, "logprobs": 2, "presence_penalty": 1.0},
    "bias": {"temperature": 1.0, "logit_bias": ((2, 1.5), (5, -3.0))},
}


def open_slots(knobs: list[dict[str, Any]]) -> Sampler:
    """A sampler with a slot for each, all with the same prompt and one id said."""
    sampler = Sampler(vocab_size=VOCABULARY, num_slots=8, device=torch.device("cpu"))
    for slot, sampling in enumerate(knobs):
        params = SamplingParams(max_tokens=99, seed=slot, **sampling)
        sampler.open(SlotOpen(slot=slot, token_ids=(1, 1, 3), num_prompt=2, sampling=params))
    return sampler


def one_by_one(sampler: Sampler, slot: int, logits: torch.Tensor, position: int) -> RowResult:
    """As many ids as there are logits: of each, the next slot's step."""
    steps = [sampler.sample(row[None], [slot], [position + n])[0] for n, row in enumerate(logits)]
    return RowResult(
        tuple([token_id for step in steps for token_id in step.ids]),
        tuple([logprob for step in steps for logprob in step.logprobs]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_as_one_id_at_a_time(seed: int) -> None:
    """Some rows with drafts, some without, all kinds together, step after step."""
    rng = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    knobs = list(KNOBS.values())
    drafting, plain = open_slots(knobs), open_slots(knobs)
    positions = [3] * len(knobs)
    lengths = set()
    for _ in range(12):
        drafts = [
            tuple(rng.choices(range(VOCABULARY), k=rng.choice((0, 1, 1, 2, 4)))) for _ in knobs
        ]
        logits = [torch.randn(len(draft) + 1, VOCABULARY, generator=numbers) for draft in drafts]
        slots = list(range(len(knobs)))
        results = drafting.sample(torch.cat(logits), slots, positions, drafts)
        for slot, (result, draft) in enumerate(zip(results, drafts, strict=True)):
            count = len(result.ids)
            expected = one_by_one(plain, slot, logits[slot][:count], positions[slot])
            assert result.ids == expected.ids
            assert [logprob.token_id for logprob in result.logprobs] == (
                list(result.ids) if "logprobs" in knobs[slot] else []
            )
            for found, known in zip(result.logprobs, expected.logprobs, strict=True):
                assert found.logprob == pytest.approx(known.logprob, abs=1e-6)
            assert result.ids[:-1] == draft[: count - 1]
            assert count == len(draft) + 1 or result.ids[-1] != draft[count - 1]
            positions[slot] += count
            lengths.add((len(draft), count))
    assert {(1, 1), (1, 2), (2, 1), (4, 1)} <= lengths


def test_penalties_count_the_drafts_before_each_id() -> None:
    """5 falls behind once it has been said, so it is right as a draft once, not twice."""
    logits = torch.tensor([[0.0, 0, 0, 0, 1.5, 2, 0]] * 3)
    for penalty, expected in ((0.0, (5, 5, 5)), (1.0, (5, 4))):
        knobs = {"temperature": 0.0, "frequency_penalty": penalty}
        (result,) = open_slots([knobs]).sample(logits, [0], [3], [(5, 5)])
        assert result.ids == expected


def test_what_was_not_accepted_was_not_said() -> None:
    """The draft 4 was wrong: 4 is not penalised after it."""
    knobs = {"temperature": 0.0, "frequency_penalty": 5.0}
    sampler = open_slots([knobs])
    logits = torch.tensor([[0.0, 0, 0, 0, 2, 3, 0]] * 2)
    assert sampler.sample(logits, [0], [3], [(4,)])[0].ids == (5,)
    assert sampler.sample(logits[:1], [0], [4])[0].ids == (4,)
