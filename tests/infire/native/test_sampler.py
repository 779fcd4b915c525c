"""The native sampler by hand: each knob, its history, drafts, and no neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from infire.native.sampler import MOST_IDS, Sampler
from infire.plan import Row, RowResult, SlotOpen
from tests.infire.cpu.sampling import Kernel, Logits, Sampling, opened, row

VOCABULARY = 200


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(tmp_path_factory.getbasetemp(), "native")


def one(kernel: Kernel, logits: Seq[float], position: int = 1, **opening: Any) -> RowResult:
    """What a request gets for these logits, alone."""
    alone = Sampling(kernel, len(logits))
    alone.open(opened(**opening))
    return alone.step([row(0, position)], np.array([logits], np.float32))[0]


# --- one knob at a time -------------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first(kernel: Kernel) -> None:
    assert one(kernel, [1.0, 3.0, 2.0, 3.0], temperature=0.0).ids == (1,)
    assert one(kernel, [1.0, 3.0, 2.0, 3.0], temperature=0.0, logprobs=0).ids == (1,)


def test_a_temperature_near_0_is_no_trouble(kernel: Kernel) -> None:
    for temperature in (1e-40, 1e-6, 1e-4):
        for filters in ({}, {"top_k": 2}, {"top_p": 0.9}):
            logits = [1.0, 300.0, 2.0]
            assert one(kernel, logits, temperature=temperature, **filters).ids == (1,)


def test_top_k_of_1_takes_the_first_of_equals(kernel: Kernel) -> None:
    ids = {one(kernel, [1.0, 3.0, 3.0], n, top_k=1).ids for n in range(1, 20)}
    assert ids == {(1,)}


def test_logit_bias_forbids_and_forces(kernel: Kernel) -> None:
    logits = [1.0, 5.0, 2.0]
    assert one(kernel, logits, temperature=0.0, logit_bias=((1, -100.0),)).ids == (2,)
    forced = ((0, 100.0), (1, 90.0))
    assert one(kernel, logits, temperature=0.0, logit_bias=forced).ids == (0,)


@pytest.mark.parametrize("token_id", [-1, 3])
def test_a_bias_outside_the_vocabulary_is_refused(token_id: int) -> None:
    sampler = Sampler(vocab_size=3, num_slots=1, max_sampled=1, num_threads=1)
    with pytest.raises(ValueError, match=f"ids 0 to 3|ids {token_id}.* in a vocabulary of 3"):
        sampler.open(opened(logit_bias=((0, 1.0), (token_id, 1.0))))


def test_a_vocabulary_beyond_the_scratch_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MOST_IDS + 1} exceeds {MOST_IDS}"):
        Sampler(vocab_size=MOST_IDS + 1, num_slots=1, max_sampled=1, num_threads=1)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits(
    kernel: Kernel,
) -> None:
    # Prompt and output count alike: 4 / 2 falls behind 3, and -1 * 2 behind -1.5.
    knobs = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert one(kernel, [4.0, 3.0], prompt=[0], **knobs).ids == (1,)
    assert one(kernel, [4.0, 3.0], prompt=[1], output=[0], **knobs).ids == (0,)
    assert one(kernel, [-1.0, -1.5], prompt=[0], **knobs).ids == (1,)


def test_the_frequency_penalty_counts_the_output_only(kernel: Kernel) -> None:
    knobs = {"temperature": 0.0, "frequency_penalty": 0.5}
    assert one(kernel, [4.0, 3.0], prompt=[0, 0, 0], **knobs).ids == (0,)
    assert one(kernel, [4.0, 3.2], prompt=[1], output=[0], **knobs).ids == (0,)
    assert one(kernel, [4.0, 3.2], prompt=[1], output=[0, 0], **knobs).ids == (1,)


def test_the_presence_penalty_is_taken_once(kernel: Kernel) -> None:
    knobs = {"temperature": 0.0, "presence_penalty": 0.5}
    assert one(kernel, [4.0, 3.2], prompt=[1], output=[0, 0, 0, 0], **knobs).ids == (0,)
    assert one(kernel, [4.0, 3.6], prompt=[1], output=[0], **knobs).ids == (1,)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ({"frequency_penalty": 1.5}, [0, 1, 0, 2]),  # 0 falls to 1.5, 1 to 0.5, 0 to 0
        ({"presence_penalty": 2.5}, [0, 1, 2, 0]),  # each falls once: to 0.5, -0.5, -1.5
        ({"repetition_penalty": 4.0}, [0, 1, 2, 0]),  # each falls once: to 0.75, 0.5, 0.25
    ],
    ids=str,
)
def test_penalties_count_what_the_sampler_itself_said(
    kernel: Kernel, penalty: dict[str, float], expected: list[int]
) -> None:
    alone = Sampling(kernel, 3)
    alone.open(opened(temperature=0.0, **penalty))
    logits = np.array([[3.0, 2.0, 1.0]], np.float32)
    assert [alone.step([row(0, n)], logits)[0].ids[0] for n in range(1, 5)] == expected


def test_a_slot_forgets_its_last_tenant(kernel: Kernel) -> None:
    alone = Sampling(kernel, 3)
    logits = np.array([[3.0, 2.0, 1.0]], np.float32)
    bias = ((0, -9.0),)
    alone.open(opened(temperature=0.0, frequency_penalty=5.0, output=[0, 1], logit_bias=bias))
    assert alone.step([row(0, 3)], logits)[0].ids == (2,)
    alone.open(opened(temperature=0.0, frequency_penalty=5.0))
    assert alone.step([row(0, 1)], logits)[0].ids == (0,)
    alone.open(opened(temperature=0.0))
    assert alone.step([row(0, 1)], logits)[0].ids == (0,)


# --- log probabilities --------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(kernel: Kernel) -> None:
    logits = [math.log(n) for n in (1, 2, 3, 4)]
    changes = {"temperature": 0.0, "logit_bias": ((0, 50.0),), "repetition_penalty": 1.5}
    (explained,) = one(kernel, logits, prompt=[3], logprobs=2, **changes).logprobs
    assert explained.token_id == 0
    assert explained.logprob == pytest.approx(math.log(0.1))
    assert [n for n, _ in explained.top] == [3, 2]
    assert [value for _, value in explained.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_each_row_gets_as_many_as_it_asked_for(kernel: Kernel) -> None:
    ours = Sampling(kernel, 4)
    for slot, logprobs in enumerate((None, 0, 3, 1, 9)):
        ours.open(opened(slot, temperature=0.0, logprobs=logprobs))
    logits = np.array([[0.0, 1.0, 2.0, 1.0]] * 5, np.float32)
    results = ours.step([row(slot, 1) for slot in range(5)], logits)
    assert [[[n for n, _ in each.top] for each in result.logprobs] for result in results] == [
        [],
        [[]],
        [[2, 1, 3]],
        [[2]],
        [[2, 1, 3, 0]],
    ]


# --- drafts -------------------------------------------------------------------------------------

KNOBS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "logprobs": 1},
    {"temperature": 0.0, "frequency_penalty": 3.0, "presence_penalty": 1.0},
    {"temperature": 0.9, "repetition_penalty": 2.0, "frequency_penalty": 1.0, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.8, "logit_bias": ((3, 4.0),)},
    {"temperature": 0.0, "logprobs": 2, "presence_penalty": 2.0},
]


def test_a_step_says_per_position_what_the_head_has_to_do() -> None:
    sampler = Sampler(vocab_size=50, num_slots=4, max_sampled=9, num_threads=1)
    asked: list[dict[str, Any]] = [
        {"temperature": 0.0, "top_k": 9},
        {"top_k": 9},
        {"top_k": 9, "logprobs": 0},
        {},
    ]
    for slot, knobs in enumerate(asked):
        sampler.open(opened(slot, **knobs))
    rows = [row(3, 5), row(0, 5, [1, 2]), row(1, 5, [7]), row(2, 5)]
    assert sampler.prepare(rows) == 7
    assert sampler.limits[:7].tolist() == [0, 1, 1, 1, 9, 9, 0]


def test_drafts_change_nothing_but_the_number_of_steps(kernel: Kernel) -> None:
    """Right drafts, wrong ones, and right ones after a wrong one, for requests of every kind."""
    chance = random.Random(7)
    length = 40
    logits = np.random.default_rng(7).normal(size=(len(KNOBS), length + 5, VOCABULARY)) * 2
    logits = logits.astype(np.float32)
    batch = [opened(slot, prompt=[3, 9], seed=slot, **knobs) for slot, knobs in enumerate(KNOBS)]

    plain = Sampling(kernel, VOCABULARY)
    plain.open(*batch)
    truth = [
        plain.step([row(slot, 2 + n) for slot in range(len(batch))], logits[:, n])
        for n in range(length + 5)
    ]

    drafted = Sampling(kernel, VOCABULARY, num_threads=3)
    drafted.open(*batch)
    done = [0] * len(batch)
    accepted = set()
    while unfinished := [slot for slot in range(len(batch)) if done[slot] < length]:
        rows: list[Row] = []
        for slot in unfinished:
            next_ids = [truth[done[slot] + n][slot].ids[0] for n in range(chance.randint(0, 3))]
            drafts = [n if chance.random() < 0.7 else (n + 1) % VOCABULARY for n in next_ids]
            rows.append(row(slot, 2 + done[slot], drafts))
        given = [
            logits[each.slot, done[each.slot] + n]
            for each in rows
            for n in range(1 + len(each.draft_ids))
        ]
        for each, result in zip(rows, drafted.step(rows, np.stack(given)), strict=True):
            at, slot = done[each.slot], each.slot
            right = [truth[at + n][slot].ids[0] for n in range(len(each.draft_ids))]
            agreed = [
                n
                for n, pair in enumerate(zip(each.draft_ids, right, strict=True))
                if pair[0] != pair[1]
            ]
            expected = agreed[0] if agreed else len(right)
            accepted.add((expected, len(right)))
            assert len(result.ids) == 1 + expected
            one_by_one = [truth[at + n][slot] for n in range(1 + expected)]
            assert result.ids == tuple(step.ids[0] for step in one_by_one)
            assert result.logprobs == tuple(said for step in one_by_one for said in step.logprobs)
            done[slot] += len(result.ids)
    assert {(0, 3), (1, 3), (3, 3), (0, 0)} <= accepted


# --- no neighbours ------------------------------------------------------------------------------


def knobs(chance: random.Random) -> dict[str, Any]:
    return {
        "seed": chance.getrandbits(64),
        "temperature": chance.choice((0.0, 0.3, 1.0, 1.7)),
        "top_k": chance.choice((0, 0, 3, 64, 100)),
        "top_p": chance.choice((1.0, 1.0, 0.92, 0.4)),
        "min_p": chance.choice((0.0, 0.0, 0.2)),
        "frequency_penalty": chance.choice((0.0, 0.0, 0.7)),
        "logprobs": chance.choice((None, None, 2)),
    }


def test_a_row_is_the_same_alone_in_any_batch_in_any_slot_and_on_any_number_of_threads(
    kernel: Kernel,
) -> None:
    chance = random.Random(9)
    ids = range(VOCABULARY)
    batch = [
        opened(slot, prompt=[1, 5], output=chance.choices(ids, k=9), **knobs(chance))
        for slot in range(40)
    ]
    logits = np.random.default_rng(9).normal(size=(40, VOCABULARY)).astype(np.float32)
    alone = []
    for n, request in enumerate(batch):
        by_itself = Sampling(kernel, VOCABULARY, num_threads=1)
        by_itself.open(request)
        alone.append(by_itself.step([row(request.slot, 11)], logits[n : n + 1])[0])
    for num_threads in (1, 2, 3, 5):
        order = chance.sample(range(40), chance.randint(20, 40))
        slots = chance.sample(range(64), len(order))
        ours = Sampling(kernel, VOCABULARY, num_threads=num_threads)
        ours.open(*(moved(batch[n], slot) for slot, n in zip(slots, order, strict=True)))
        found = ours.step([row(slot, 11) for slot in slots], logits[order], seed=num_threads)
        assert found == [alone[n] for n in order]


def moved(request: SlotOpen, slot: int) -> SlotOpen:
    return SlotOpen(
        slot=slot,
        token_ids=request.token_ids,
        num_prompt=request.num_prompt,
        sampling=request.sampling,
    )


def test_a_resumed_request_draws_as_if_it_had_never_stopped(kernel: Kernel) -> None:
    logits: Logits = np.random.default_rng(2).normal(size=(30, 1, VOCABULARY)).astype(np.float32)
    sampling = {"seed": 4, "temperature": 1.2, "frequency_penalty": 0.8, "top_p": 0.9}
    whole, resumed = Sampling(kernel, VOCABULARY), Sampling(kernel, VOCABULARY)
    whole.open(opened(prompt=[1, 2], **sampling))
    said = [whole.step([row(0, 2 + n)], logits[n])[0].ids[0] for n in range(30)]
    resumed.open(opened(prompt=[1, 2], output=said[:11], **sampling))
    assert [resumed.step([row(0, 2 + n)], logits[n])[0].ids[0] for n in range(11, 30)] == said[11:]
