"""Placement: values in, values out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from origin_gpu.place import Candidate, Placement, Split, Whole, place, place_embed, place_whole
from origin_gpu.report import room, served_models
from routing import wire
from routing.errors import Code, Failure
from routing.region import ModelReport

REQUEST = wire.Generate(
    request_id="r",
    tenant_salt=b"",
    model="m",
    tokenizer_digest="t",
    token_ids=(1, 2, 3),
    sampling=wire.Sampling(max_tokens=9, seed=1),
    budget_s=9.0,
)


def report(model: str = "m", tokenizer: str = "t", max_sequence_tokens: int = 50) -> ModelReport:
    return ModelReport(
        model=model,
        model_digest="d",
        tokenizer_digest=tokenizer,
        context_window=100,
        max_sequence_tokens=max_sequence_tokens,
    )


def in_region(model: ModelReport, room: int = 5) -> ModelReport:
    return msgspec.structs.replace(model, room=room)


PREFILL = Candidate(
    name="p", role="prefill", models=(report(),), layout_digest="l", room=5, tokens_in_flight=0
)
DECODE = replace(PREFILL, name="d", role="decode")
BOTH = replace(PREFILL, name="b", role="both")


def failure(ready: Sequence[Candidate], request: wire.Generate = REQUEST) -> Failure:
    with pytest.raises(Failure) as caught:
        place(ready, request)
    return caught.value


def test_a_pair_shares_the_request() -> None:
    assert place([PREFILL, DECODE], REQUEST) == Split("p", "d")


@pytest.mark.parametrize(
    "request_",
    [
        msgspec.structs.replace(REQUEST, reject_if_busy=True),
        msgspec.structs.replace(REQUEST, priority=-1),
    ],
)
def test_who_never_waits_goes_only_where_it_begins_at_once(request_: wire.Generate) -> None:
    busy = replace(DECODE, idle=0)
    assert place([PREFILL, busy], REQUEST) == Split("p", "d")
    assert failure([PREFILL, busy], request_).code is Code.NO_CAPACITY
    other = replace(DECODE, name="d1", tokens_in_flight=900)
    assert place([PREFILL, busy, other], request_) == Split("p", "d1")


def test_a_worker_of_both_roles_keeps_it_whole() -> None:
    assert place([BOTH], REQUEST) == Whole("b")


def test_on_each_side_the_fewest_tokens_in_flight_win() -> None:
    ready = [
        replace(PREFILL, name="p0", tokens_in_flight=10),
        replace(PREFILL, name="p1", tokens_in_flight=9),
        replace(DECODE, name="d0", tokens_in_flight=500),
        replace(DECODE, name="d1", tokens_in_flight=501),
    ]
    assert place(ready, REQUEST) == Split("p1", "d0")


def test_a_pair_is_as_loaded_as_its_busier_half() -> None:
    pair = [PREFILL, replace(DECODE, tokens_in_flight=7)]
    assert place([*pair, replace(BOTH, tokens_in_flight=6)], REQUEST) == Whole("b")
    assert place([*pair, replace(BOTH, tokens_in_flight=8)], REQUEST) == Split("p", "d")


def test_kv_passes_only_between_workers_of_one_layout() -> None:
    ready = [
        replace(PREFILL, name="p-other", layout_digest="other"),
        replace(PREFILL, name="p", tokens_in_flight=100),
        DECODE,
    ]
    assert place(ready, REQUEST) == Split("p", "d")
    assert failure([ready[0], DECODE]).code is Code.INCOMPATIBLE


def test_full_workers_are_passed_over_and_when_all_are_full_the_client_is_told_when_to_return() -> (
    None
):
    full = replace(PREFILL, name="p-full", room=0)
    assert place([full, replace(PREFILL, tokens_in_flight=999), DECODE], REQUEST) == Split("p", "d")
    refusal = failure([full, DECODE])
    assert refusal.code is Code.NO_CAPACITY
    assert refusal.retry_after_s


@pytest.mark.parametrize(
    ("ready", "code"),
    [
        ([], Code.UNAVAILABLE),
        ([replace(BOTH, models=(report("other"),))], Code.UNAVAILABLE),
        ([replace(BOTH, models=(report(tokenizer="old"),))], Code.STALE_TOKENIZER),
    ],
)
def test_without_a_way_to_serve_the_reason_is_told(ready: list[Candidate], code: Code) -> None:
    assert failure(ready).code is code


@pytest.mark.parametrize("only", [PREFILL, DECODE])
def test_where_a_role_is_missing_the_other_does_both(only: Candidate) -> None:
    assert place([only], REQUEST) == Whole(only.name)
    assert failure([replace(only, room=0)]).code is Code.NO_CAPACITY


def test_full_prefill_workers_are_not_missing() -> None:
    assert failure([replace(PREFILL, room=0), DECODE]).code is Code.NO_CAPACITY


def test_the_worker_that_has_the_prefix_gets_the_request_until_it_is_too_busy() -> None:
    """Case 20: it saves 2 of 3 tokens there, so it may be 2 tokens busier."""
    hot = replace(PREFILL, name="hot", cached_tokens=2)
    cold = replace(PREFILL, name="cold")
    for in_flight, chosen in ((0, "hot"), (1, "hot"), (3, "cold")):
        ready = [replace(hot, tokens_in_flight=in_flight), cold, DECODE]
        assert place(ready, REQUEST) == Split(chosen, "d")


def test_short_work_is_done_where_the_output_is_made() -> None:
    warm = replace(DECODE, name="warm", cached_tokens=2)
    assert place([PREFILL, DECODE, warm], REQUEST, local_tokens=1) == Whole("warm")
    assert place([PREFILL, DECODE, warm], REQUEST, local_tokens=0) == Split("p", "warm")
    assert place([PREFILL, DECODE], REQUEST, local_tokens=2) == Split("p", "d")
    assert place([PREFILL, DECODE], REQUEST, local_tokens=3) == Whole("d")


def test_but_not_where_much_more_is_going_on_than_elsewhere() -> None:
    warm = replace(DECODE, name="warm", cached_tokens=2, tokens_in_flight=13)
    for in_flight, placed in ((10, Whole("warm")), (9, Split("p", "d"))):
        ready = [PREFILL, replace(DECODE, tokens_in_flight=in_flight), warm]
        assert place(ready, REQUEST, local_tokens=1) == placed


def test_equals_are_told_apart_by_the_session() -> None:
    ready = [replace(it, name=f"{it.name}{n}") for n in range(4) for it in (PREFILL, DECODE)]
    fewer = [it for it in ready if it.name != "p0"]
    chosen = set()
    for session in range(64):
        request = msgspec.structs.replace(REQUEST, affinity=bytes([session]) * 16)
        placed = place(ready, request)
        assert isinstance(placed, Split)
        assert place(ready[::-1], request) == placed
        if placed.prefill != "p0":  # a worker less moves only its own sessions
            assert place(fewer, request) == placed
        chosen.add(placed.prefill)
    assert chosen == {f"p{n}" for n in range(4)}


def test_one_model_may_be_served_with_two_tokenizers() -> None:
    old = replace(BOTH, name="old", models=(report(tokenizer="old"),))
    assert place([old, replace(BOTH, tokens_in_flight=99)], REQUEST) == Whole("b")


def test_what_is_computed_anew_goes_to_a_prefill_worker_last() -> None:
    busy = replace(DECODE, tokens_in_flight=10_000)
    assert place_whole([PREFILL, busy], REQUEST) == Whole("d")
    assert place_whole([PREFILL, replace(busy, room=0)], REQUEST) == Whole("p")
    with pytest.raises(Failure):
        place_whole([replace(PREFILL, room=0)], REQUEST)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_pool_a_placement_is_one_that_works(seed: int) -> None:
    rng = random.Random(seed)
    ready = [
        Candidate(
            name=f"w{n}",
            role=rng.choice(["prefill", "decode", "both"]),
            models=tuple(
                report(rng.choice(["m", "n"]), rng.choice(["t", "u"]))
                for _ in range(rng.randrange(3))
            ),
            layout_digest=rng.choice(["l", "k"]),
            room=rng.randrange(3),
            tokens_in_flight=rng.randrange(100),
            cached_tokens=rng.randrange(3),
        )
        for n in range(rng.randrange(7))
    ]
    by_name = {it.name: it for it in ready}
    able = [it for it in ready if it.room and report() in it.models]
    roles = {it.role for it in ready if report() in it.models}
    local_tokens = rng.randrange(4)
    try:
        placed: Placement = place(ready, REQUEST, local_tokens=local_tokens)
    except Failure:
        assert not any(it.role == "both" for it in able)
        assert not any(
            p.role == "prefill" and d.role == "decode" and p.layout_digest == d.layout_digest
            for p in able
            for d in able
        )
        return
    match placed:
        case Whole(worker):
            assert by_name[worker] in able
            local = by_name[worker].cached_tokens + local_tokens >= len(REQUEST.token_ids)
            role = by_name[worker].role
            assert len(roles) == 1 or role == "both" or (role == "decode" and local)
        case Split(prefill, decode):
            assert {by_name[prefill].role, by_name[decode].role} == {"prefill", "decode"}
            assert by_name[prefill].layout_digest == by_name[decode].layout_digest
            assert by_name[prefill] in able
            assert by_name[decode] in able


def test_a_region_has_room_as_far_as_both_sides_have() -> None:
    assert room([replace(PREFILL, room=9), DECODE, replace(DECODE, room=1), BOTH]) == 6 + 5
    assert room([PREFILL]) == 5
    assert room([PREFILL, BOTH]) == 5
    assert room([]) == 0


def test_a_region_serves_a_model_when_a_request_could_go_all_the_way() -> None:
    assert served_models([PREFILL, replace(DECODE, layout_digest="other")]) == ()
    smaller = replace(DECODE, models=(report(max_sequence_tokens=40), report("elsewhere")))
    both = (in_region(report("elsewhere")), in_region(report(max_sequence_tokens=40)))
    assert served_models([PREFILL, smaller]) == both


def test_each_model_has_the_room_of_its_own_workers() -> None:
    other = replace(BOTH, name="e", models=(report("vectors"),), room=2)
    known = {it.model: it.room for it in served_models([PREFILL, DECODE, other])}
    assert known == {"m": 5, "vectors": 2}


EMBED = wire.Embed(
    request_id="r",
    tenant_salt=b"",
    model="m",
    tokenizer_digest="t",
    texts=((1, 2), (3,)),
    budget_s=9.0,
)


def test_texts_go_to_the_worker_with_the_fewest_tokens_to_read() -> None:
    busy = replace(BOTH, tokens_in_flight=3)
    calm = replace(BOTH, name="c", tokens_in_flight=2)
    other = replace(BOTH, name="a", models=(report("elsewhere"),))
    assert place_embed([busy, calm, other], EMBED) == "c"
    assert place_embed([busy, replace(calm, room=0), other], EMBED) == "b"


@pytest.mark.parametrize(
    ("ready", "code"),
    [
        ([replace(BOTH, models=(report("elsewhere"),))], Code.UNAVAILABLE),
        ([replace(BOTH, models=(report(tokenizer="other"),))], Code.STALE_TOKENIZER),
        ([replace(BOTH, room=0)], Code.NO_CAPACITY),
    ],
)
def test_texts_that_no_worker_can_take(ready: list[Candidate], code: Code) -> None:
    with pytest.raises(Failure) as caught:
        place_embed(ready, EMBED)
    assert caught.value.code is code


def test_texts_that_must_not_wait_go_to_an_idle_worker_or_nowhere() -> None:
    hurried = msgspec.structs.replace(EMBED, reject_if_busy=True)
    busy, idle = replace(BOTH, idle=0), replace(BOTH, name="i", tokens_in_flight=9)
    assert place_embed([busy, idle], hurried) == "i"
    with pytest.raises(Failure, match="no room"):
        place_embed([busy], hurried)
