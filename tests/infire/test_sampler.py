"""The sampler against plain Python: each knob, its order, its history, and no neighbours."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from infire.kernels.draw import uniform
from infire.plan import RowResult, SlotOpen
from infire.request import SamplingParams
from infire.sampler import Sampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCABULARY = 50
SLOTS = 64


def sampler(vocabulary: int = VOCABULARY, device: str = "cpu") -> Sampler:
    return Sampler(vocab_size=vocabulary, num_slots=SLOTS, device=torch.device(device))


def opened(
    slot: int = 0, *, prompt: Seq[int] = (), output: Seq[int] = (), **sampling: Any
) -> SlotOpen:
    return SlotOpen(
        slot=slot,
        token_ids=(*prompt, *output),
        num_prompt=len(prompt),
        sampling=SamplingParams(**({"max_tokens": 100, "seed": 1} | sampling)),
    )


def one(logits: Seq[float], position: int = 0, **opening: Any) -> RowResult:
    """What a request gets for these logits, alone."""
    alone = sampler(len(logits))
    alone.open(opened(**opening))
    return alone.sample(torch.tensor([logits]), [0], [position])[0]


def distribution(
    logits: Seq[float], prompt: Seq[int], output: Seq[int], asked: SamplingParams
) -> list[float]:
    """The probability of each id, in plain Python, as the sampler's first lines say."""
    values = list(logits)
    for n, bias in asked.logit_bias:
        values[n] += bias
    for n in {*prompt, *output}:
        r = asked.repetition_penalty
        values[n] = values[n] / r if values[n] > 0 else values[n] * r
    for n, count in Counter(output).items():
        values[n] -= asked.frequency_penalty * count + asked.presence_penalty
    top = max(values)
    if asked.temperature == 0:
        return [float(n == values.index(top)) for n in range(len(values))]
    weights = [math.exp((value - top) / asked.temperature) for value in values]
    total = sum(weights)
    order = sorted(range(len(values)), key=lambda n: (-weights[n], n))[: asked.top_k or None]
    total = sum(weights[n] for n in order)
    some: list[int] = []
    for n in order:
        if some and sum(weights[m] for m in some) >= asked.top_p * total:
            break
        some.append(n)
    some = [n for n in some if weights[n] >= asked.min_p * weights[order[0]]]
    total = sum(weights[n] for n in some)
    return [weights[n] / total if n in some else 0.0 for n in range(len(values))]


def pick(probabilities: Seq[float], number: float) -> int:
    passed = 0.0
    for n, probability in enumerate(probabilities):
        passed += probability
        if passed > number:
            return n
    raise AssertionError(number)


# --- one knob at a time -----------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert one([1.0, 3.0, 2.0, 3.0], temperature=0.0).ids == (1,)


def test_a_temperature_near_0_is_no_trouble() -> None:
    for temperature in (1e-40, 1e-6, 1e-4):
        assert one([1.0, 300.0, 2.0], temperature=temperature).ids == (1,)


def test_top_k_of_1_takes_the_first_of_equals() -> None:
    assert {one([1.0, 3.0, 3.0], n, top_k=1).ids for n in range(20)} == {(1,)}


def test_logit_bias_forbids_and_forces() -> None:
    logits = [1.0, 5.0, 2.0]
    assert one(logits, temperature=0.0, logit_bias=((1, -100.0),)).ids == (2,)
    assert one(logits, temperature=0.0, logit_bias=((0, 100.0), (1, 90.0))).ids == (0,)


@pytest.mark.parametrize("token_id", [-1, 3])
def test_a_bias_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match=f"ids 0 to 3|ids {token_id}.* in a vocabulary of 3"):
        one([1.0, 5.0, 2.0], logit_bias=((0, 1.0), (token_id, 1.0)))


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    # Prompt and output count alike: 4 / 2 falls behind 3, and -1 * 2 behind -1.5.
    knobs = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert one([4.0, 3.0], prompt=[0], **knobs).ids == (1,)
    assert one([4.0, 3.0], output=[0], prompt=[1], **knobs | {"repetition_penalty": 1.2}).ids == (
        0,
    )
    assert one([-1.0, -1.5], prompt=[0], **knobs).ids == (1,)


def test_the_frequency_penalty_counts_the_output_only() -> None:
    knobs = {"temperature": 0.0, "frequency_penalty": 0.5}
    assert one([4.0, 3.0], prompt=[0, 0, 0], **knobs).ids == (0,)
    assert one([4.0, 3.2], prompt=[1], output=[0], **knobs).ids == (0,)
    assert one([4.0, 3.2], prompt=[1], output=[0, 0], **knobs).ids == (1,)


def test_the_presence_penalty_is_taken_once() -> None:
    knobs = {"temperature": 0.0, "presence_penalty": 0.5}
    assert one([4.0, 3.2], prompt=[1], output=[0, 0, 0, 0], **knobs).ids == (0,)
    assert one([4.0, 3.6], prompt=[1], output=[0], **knobs).ids == (1,)


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
    penalty: dict[str, float], expected: list[int]
) -> None:
    alone = sampler(3)
    alone.open(opened(temperature=0.0, **penalty))
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert [alone.sample(logits, [0], [n])[0].ids[0] for n in range(4)] == expected


def test_a_slot_forgets_its_last_tenant() -> None:
    alone = sampler(3)
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    bias = ((0, -9.0),)
    alone.open(opened(temperature=0.0, frequency_penalty=5.0, output=[0, 1], logit_bias=bias))
    assert alone.sample(logits, [0], [2])[0].ids == (2,)
    alone.open(opened(temperature=0.0, frequency_penalty=5.0))
    assert alone.sample(logits, [0], [0])[0].ids == (0,)
    alone.open(opened(temperature=0.0))
    assert alone.sample(logits, [0], [0])[0].ids == (0,)


# --- all knobs ----------------------------------------------------------------------------------


def knobs(chance: random.Random) -> dict[str, Any]:
    def bias() -> tuple[tuple[int, float], ...]:
        return tuple((n, chance.uniform(-3, 3)) for n in chance.sample(range(VOCABULARY), 4))

    return {
        "seed": chance.choice((0, 5, 2**63 + 1, -7)),
        "temperature": chance.choice((0.0, 0.3, 1.0, 1.7)),
        "top_k": chance.choice((0, 0, 3, 20)),
        "top_p": chance.choice((1.0, 1.0, 0.92, 0.4)),
        "min_p": chance.choice((0.0, 0.0, 0.2)),
        "repetition_penalty": chance.choice((1.0, 1.0, 1.3, 0.8)),
        "frequency_penalty": chance.choice((0.0, 0.0, 0.7, -0.4)),
        "presence_penalty": chance.choice((0.0, 0.0, 0.9, -0.5)),
        "logit_bias": chance.choice(((), (), bias())),
    }


def requests(count: int, seed: int) -> list[SlotOpen]:
    """One in each of the first slots."""
    chance = random.Random(seed)
    ids = range(VOCABULARY)
    return [
        opened(
            n,
            prompt=chance.choices(ids, k=chance.randint(1, 30)),
            output=chance.choices(ids, k=chance.randint(0, 30)),
            **knobs(chance),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_a_batch_of_all_knobs_is_as_plain_python_says(seed: int, device: str) -> None:
    batch = requests(SLOTS, seed)
    torch.manual_seed(seed)
    logits = torch.randn(SLOTS, VOCABULARY) * 2
    ours = sampler(device=device)
    for request in batch:
        ours.open(request)
    found = ours.sample(logits.to(device), range(SLOTS), range(100, 100 + SLOTS))
    for n, (request, result) in enumerate(zip(batch, found, strict=True)):
        ids, split = request.token_ids, request.num_prompt
        exact = distribution(logits[n].tolist(), ids[:split], ids[split:], request.sampling)
        assert result.ids == (pick(exact, uniform(request.sampling.seed, 100 + n)),)


def test_a_row_is_the_same_alone_in_any_batch_and_in_any_slot() -> None:
    batch = requests(40, seed=9)
    torch.manual_seed(9)
    logits = torch.randn(40, VOCABULARY)
    chance = random.Random(9)
    alone = []
    for n, request in enumerate(batch):
        by_itself = sampler()
        by_itself.open(request)
        alone.append(by_itself.sample(logits[n : n + 1], [request.slot], [n])[0])
    for _ in range(5):
        order = chance.sample(range(40), chance.randint(2, 40))
        slots = chance.sample(range(SLOTS), len(order))
        ours = sampler()
        for slot, n in zip(slots, order, strict=True):
            was = batch[n]
            ours.open(
                SlotOpen(
                    slot=slot,
                    token_ids=was.token_ids,
                    num_prompt=was.num_prompt,
                    sampling=was.sampling,
                )
            )
        assert ours.sample(logits[order], slots, order) == [alone[n] for n in order]


def test_a_resumed_request_draws_as_if_it_had_never_stopped() -> None:
    torch.manual_seed(2)
    logits = torch.randn(30, 1, VOCABULARY)
    sampling = {"seed": 4, "temperature": 1.2, "frequency_penalty": 0.8, "top_p": 0.9}
    whole, resumed = sampler(), sampler()
    whole.open(opened(prompt=[1, 2], **sampling))
    said = [whole.sample(logits[n], [0], [2 + n])[0].ids[0] for n in range(30)]
    resumed.open(opened(prompt=[1, 2], output=said[:11], **sampling))
    assert [resumed.sample(logits[n], [0], [2 + n])[0].ids[0] for n in range(11, 30)] == said[11:]


@pytest.mark.parametrize(
    "knob",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_20_000_draws_are_distributed_as_asked(knob: dict[str, Any]) -> None:
    logits = [math.sin(n) * 2 for n in range(20)]
    many = sampler(20)
    rows = torch.tensor([logits] * SLOTS)
    for slot in range(SLOTS):
        many.open(opened(slot, seed=slot, **knob))
    counts = Counter(
        result.ids[0]
        for step in range(20_000 // SLOTS)
        for result in many.sample(rows, range(SLOTS), [step] * SLOTS)
    )
    draws = counts.total()
    exact = distribution(logits, [], [], opened(**knob).sampling)
    assert all(exact[n] for n in counts), "nothing that was filtered out is ever drawn"
    likely = [n for n in range(20) if exact[n] * draws >= 5]
    square = sum((counts[n] - exact[n] * draws) ** 2 / (exact[n] * draws) for n in likely)
    freedom = len(likely) - 1
    assert square < freedom + 4 * (2 * freedom) ** 0.5


# --- log probabilities --------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own() -> None:
    logits = [math.log(n) for n in (1, 2, 3, 4)]
    changes = {"temperature": 0.0, "logit_bias": ((0, 50.0),), "repetition_penalty": 1.5}
    (explained,) = one(logits, prompt=[3], logprobs=2, **changes).logprobs
    assert explained.token_id == 0
    assert explained.logprob == pytest.approx(math.log(0.1))
    assert [n for n, _ in explained.top] == [3, 2]
    assert [value for _, value in explained.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_each_row_gets_as_many_as_it_asked_for() -> None:
    ours = sampler(4)
    for slot, logprobs in enumerate((None, 0, 3, 1)):
        ours.open(opened(slot, temperature=0.0, logprobs=logprobs))
    results = ours.sample(torch.tensor([[0.0, 1.0, 2.0, 1.0]] * 4), range(4), [0] * 4)
    assert [[[n for n, _ in each.top] for each in result.logprobs] for result in results] == [
        [],
        [[]],
        [[2, 1, 3]],
        [[2]],
    ]


# --- broken numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}])
def test_numbers_that_are_none_cost_neighbours_nothing(
    sampling: dict[str, Any], device: str
) -> None:
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[1.0, 2.0, 0.0], [nan] * 3, [nan, 1.0, -inf], [-inf] * 3, [inf, 0, inf]])
    ours = sampler(3, device)
    for slot in range(5):
        ours.open(opened(slot, logprobs=1, **sampling))
    results = ours.sample(rows.to(device), range(5), [0] * 5)
    alone = one([1.0, 2.0, 0.0], logprobs=1, **sampling)
    assert results[0].ids == alone.ids
    assert results[0].logprobs[0].logprob == pytest.approx(alone.logprobs[0].logprob)
    assert results[2].ids == (1,)
    assert all(0 <= result.ids[0] < 3 for result in results)
    assert all(math.isfinite(result.logprobs[0].logprob) for result in results)
