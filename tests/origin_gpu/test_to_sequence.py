"""Wire types and engine types are written down twice: here is what keeps them the same."""

from __future__ import annotations

import msgspec
import pytest

from infire import request as engine
from origin_gpu.worker import to_sequence, to_tokens, to_usage
from routing import wire

FULL = wire.Generate(
    request_id="r1",
    tenant_salt=b"salt",
    model="@cf/test/counting",
    tokenizer_digest="t" * 64,
    token_ids=(5, 6, 7),
    generated_ids=(8, 9),
    sampling=wire.Sampling(
        max_tokens=11,
        seed=12,
        temperature=0.1,
        top_p=0.2,
        top_k=3,
        min_p=0.4,
        repetition_penalty=1.5,
        frequency_penalty=0.6,
        presence_penalty=0.7,
        logit_bias=((1, 0.8),),
        logprobs=9,
        stop_ids=(10,),
        speculate=False,
    ),
    grammar=wire.Grammar("regex", "a+"),
    adapter="mine",
    priority=13,
    budget_s=14.0,
)


def fields(kind: type[msgspec.Struct]) -> dict[str, object]:
    """Names with defaults."""
    return {
        field.name: (field.default, field.default_factory) for field in msgspec.structs.fields(kind)
    }


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (wire.Sampling, engine.SamplingParams),
        (wire.Logprob, engine.Logprob),
        (wire.Grammar, engine.Grammar),
    ],
)
def test_the_engine_has_the_same_fields(
    here: type[msgspec.Struct], there: type[msgspec.Struct]
) -> None:
    assert fields(here) == fields(there)
    annotations = [{it.name: it.type for it in msgspec.structs.fields(k)} for k in (here, there)]
    assert annotations[0] == annotations[1]


def test_reasons_are_the_same() -> None:
    assert wire.Reason == engine.Reason


def test_a_sequence_has_the_fields_of_a_generate_but_for_those_of_one_side_only() -> None:
    edge_only = {"tokenizer_digest", "budget_s", "reject_if_busy"}  # checked at the worker's door
    edge_only |= {"affinity"}  # the front's
    renamed = {"tenant_salt": "cache_salt"}
    joined = {"generated_ids"}  # follow the prompt in token_ids
    engine_only = {"num_prompt", "hold", "num_computed", "block_ids", "slot", "num_preempted"}
    asked = {renamed.get(name, name) for name in fields(wire.Generate)} - edge_only - joined
    assert asked == set(fields(engine.Sequence)) - engine_only


def test_everything_arrives() -> None:
    defaults = wire.Sampling(max_tokens=1, seed=1)
    for name in msgspec.structs.asdict(defaults):
        assert getattr(FULL.sampling, name) != getattr(defaults, name), "else it proves nothing"
    made = to_sequence(FULL)
    assert made == engine.Sequence(
        request_id="r1",
        model="@cf/test/counting",
        token_ids=[5, 6, 7, 8, 9],
        num_prompt=3,
        sampling=msgspec.convert(msgspec.structs.asdict(FULL.sampling), engine.SamplingParams),
        cache_salt=b"salt",
        grammar=engine.Grammar("regex", "a+"),
        adapter="mine",
        priority=13,
    )
    assert made.num_output == 2


def test_what_the_engine_says_goes_back() -> None:
    logprob = engine.Logprob(4, -0.5, ((4, -0.5), (3, -1.5)))
    step = engine.Step(request_id="r1", ids=(4,), logprobs=(logprob,))
    assert to_tokens(step) == wire.Tokens((4,), (wire.Logprob(4, -0.5, ((4, -0.5), (3, -1.5))),))
    assert to_usage(FULL, 7, 2) == wire.Usage(prompt_tokens=3, completion_tokens=7, cached_tokens=2)
