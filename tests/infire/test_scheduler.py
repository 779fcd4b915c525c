from __future__ import annotations

import msgspec
import pytest

from infire.admission import Refusal
from infire.plan import RowResult, StepPlan
from infire.request import Logprob, Step
from routing.errors import Code
from tests.fakes.sequences import answer, sequence
from tests.infire.scheduling import Rig, held_in, shape


def test_a_prompt_is_answered_and_its_blocks_come_back() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=5, max_tokens=4))
    steps = [rig.step() for _ in range(4)]
    assert [step.ids for gained in steps for step in gained] == [(5,), (6,), (7,), (8,)]
    assert [step.finish for gained in steps for step in gained] == [None, None, None, "length"]
    assert [step.num_computed for gained in steps for step in gained] == [5, 6, 7, 8]
    assert rig.num_free == 16
    assert not rig.plan()


def test_rows_one_behind_come_first_and_prompts_fill_the_step() -> None:
    rig = Rig(64, max_step_tokens=10)
    rig.scheduler.add(sequence("a", prompt=4))
    rig.scheduler.add(sequence("b", prompt=4))
    rig.step()
    rig.scheduler.add(sequence("long", prompt=19))
    rig.scheduler.add(sequence("last", prompt=6))
    first = rig.plan()
    assert shape(first) == [(0, 1), (1, 1), (2, 8)]
    assert [row.sample for row in first.rows] == [True, True, False]
    assert [step.request_id for step in rig.finish(first)] == ["a", "b"]
    second = rig.plan()
    assert shape(second) == [(0, 1), (1, 1), (2, 8)]
    rig.finish(second)
    third = rig.plan()
    assert shape(third) == [(0, 1), (1, 1), (2, 3), (3, 5)]
    assert [step.request_id for step in rig.finish(third)] == ["a", "b", "long"]


def test_higher_priority_goes_first_then_who_came_first() -> None:
    rig = Rig(64, max_step_tokens=4, max_running=1)
    for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("late", -1)):
        rig.scheduler.add(sequence(name, prompt=4, max_tokens=1, priority=priority))
    assert [rig.step()[0].request_id for _ in range(4)] == ["urgent", "a", "b", "late"]


def test_no_more_run_than_a_step_has_tokens() -> None:
    """Else those last in order would be given none, while they keep their blocks."""
    rig = Rig(64, max_step_tokens=3, max_running=8)
    for n in range(5):
        rig.scheduler.add(sequence(f"r{n}", prompt=8), num_adopted=7)
    assert [adoption.request_id for adoption in rig.scheduler.place()] == ["r0", "r1", "r2"]
    assert len(rig.plan().rows) == 3


def test_plans_tell_the_runner_only_what_is_new() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=4, max_tokens=3))
    first = rig.plan()
    assert [opened.slot for opened in first.opens] == [0]
    assert [len(group) for group in first.rows[0].new_blocks] == [1]
    rig.finish(first)
    second = rig.plan()
    assert second.opens == ()
    assert [len(group) for group in second.rows[0].new_blocks] == [1]
    rig.finish(second)
    third = rig.plan()
    assert third.rows[0].new_blocks == ()
    rig.finish(third)
    rig.scheduler.add(sequence("b"))
    assert rig.plan().closes == (0,)


def test_a_plan_is_a_message() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=4))
    plan = rig.plan()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan


@pytest.mark.parametrize(
    ("wrong", "num_adopted", "detail"),
    [
        (sequence("a", prompt=40, max_tokens=25), 0, "40 tokens and max_tokens of 25 .* the 64 "),
        (sequence("a", prompt=0), 0, "prompt of 0 tokens in 0 ids"),
        (sequence("a", prompt=2, max_tokens=0), 0, "max_tokens of 0"),
        (sequence("a", prompt=2, generated=3, max_tokens=3), 0, "none after 3"),
        (sequence("a", prompt=3), 3, "KV of 3 tokens for 3 ids"),
        (sequence("taken"), 0, "'taken' is in use"),
    ],
)
def test_what_can_never_run_is_refused_with_numbers(wrong, num_adopted, detail) -> None:
    rig = Rig(16)
    rig.scheduler.add(sequence("taken"))
    with pytest.raises(Refusal, match=detail) as caught:
        rig.scheduler.add(wrong, num_adopted)
    assert Code(caught.value.code) is Code.BAD_INPUT
    rig.scheduler.check()
    assert list(rig.run_out()) == ["taken"]


def test_an_unknown_id_is_refused_before_it_meets_the_model() -> None:
    rig = Rig()
    for bad in (-1, 256):
        seq = sequence("a")
        seq.token_ids[1] = bad
        with pytest.raises(Refusal, match="in a vocabulary of 256"):
            rig.scheduler.add(seq)
    seq = sequence("a")
    seq.sampling = msgspec.structs.replace(seq.sampling, logit_bias=((256, 1.0),))
    with pytest.raises(Refusal, match="from 256 to 256"):
        rig.scheduler.add(seq)


def test_the_context_window_bounds_a_sequence() -> None:
    rig = Rig(16, context_window=20)
    assert rig.scheduler.max_sequence_tokens == 20
    rig.scheduler.add(sequence("fits", prompt=12, max_tokens=8))
    with pytest.raises(Refusal, match="exceed the 20 tokens"):
        rig.scheduler.add(sequence("a", prompt=12, max_tokens=9))
    assert rig.run_out() == {"fits": answer(12, 8)}


def test_a_sequence_may_fill_the_whole_pool() -> None:
    rig = Rig(16)
    rig.scheduler.add(sequence("a", prompt=40, max_tokens=24))
    assert rig.run_out() == {"a": answer(40, 24)}


def burst(rig: Rig, *ids: int) -> Step:
    """Commit a plan whose one row had all but the last of `ids` accepted as drafts."""
    logprobs = tuple(Logprob(token_id, -1.0) for token_id in ids)
    plan = rig.plan()
    row = msgspec.structs.replace(plan.rows[0], draft_ids=ids[:-1])
    plan = msgspec.structs.replace(plan, rows=(row,))
    (step,) = rig.scheduler.commit(plan, [RowResult(ids, logprobs)])
    rig.scheduler.check()
    return step


def test_a_stop_id_cuts_a_burst() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=3, max_tokens=9, stop_ids=(50,), hold=True))
    step = burst(rig, 40, 50, 60)
    assert (step.ids, step.finish, step.num_computed) == ((40, 50), "stop", 4)
    assert [logprob.token_id for logprob in step.logprobs] == [40, 50]


def test_max_tokens_cuts_a_burst() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=3, max_tokens=2, stop_ids=(60,), hold=True))
    step = burst(rig, 40, 50, 60)
    assert (step.ids, step.finish, step.num_computed) == ((40, 50), "length", 4)
    held = held_in(rig.scheduler, "a")
    assert held is not None
    assert held.token_ids == [0, 1, 2, 40, 50]


def test_a_stop_id_as_last_token_is_a_stop() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=3, max_tokens=2, stop_ids=(4,)))
    assert [step.finish for _ in range(2) for step in rig.step()] == [None, "stop"]


def test_resumed_ids_are_computed_but_not_said_again() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=3, generated=2, max_tokens=4))
    (step,) = rig.step()
    assert (step.ids, step.num_computed) == ((5,), 5)
    assert rig.scheduler.gauges().prompt_tokens_computed == 3
    (step,) = rig.step()
    assert (step.ids, step.finish) == ((6,), "length")


def test_held_blocks_stay_until_dropped() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("a", prompt=9, max_tokens=1, hold=True))
    rig.step()
    assert rig.num_free == 13
    assert rig.scheduler.gauges().held == 1
    held = held_in(rig.scheduler, "a")
    assert held is not None
    assert held.num_computed == 9
    rig.drop("a")
    assert held_in(rig.scheduler, "a") is None
    assert rig.num_free == 16


def test_dropping_a_request_in_a_running_step_frees_it_when_the_step_ends() -> None:
    rig = Rig(max_step_tokens=8)
    rig.scheduler.add(sequence("gone", prompt=20))
    rig.scheduler.add(sequence("stays"))
    plan = rig.plan()
    rig.drop("gone")
    assert rig.num_free == 14  # the step still writes there
    rig.scheduler.add(sequence("gone", prompt=2))  # the name is free at once
    assert rig.finish(plan) == []
    assert rig.num_free == 16
    assert rig.scheduler.gauges().prompt_tokens_computed == 8  # and not one chunk more
    assert rig.run_out() == {"stays": answer(3, 4), "gone": answer(2, 4)}


def test_dropping_what_is_not_there_is_nothing() -> None:
    rig = Rig()
    rig.scheduler.add(sequence("waits"))
    rig.drop("waits")
    rig.drop("waits")
    rig.drop("never came")
    assert not rig.plan()


@pytest.mark.parametrize("windows", [(6,), (None, 6), (1, 9, None)])
@pytest.mark.parametrize("chunked", [False, True])
def test_windowed_groups_give_blocks_back_as_they_go(windows, chunked: bool) -> None:
    rig = Rig(40, windows=windows, chunked=chunked, max_step_tokens=7)
    rig.scheduler.add(sequence("a", prompt=60, max_tokens=60, hold=True))
    assert rig.run_out() == {"a": answer(60, 60)}
    for pool, window in zip(rig.pools, windows, strict=True):
        assert 40 - pool.num_free <= (30 if window is None else 3)
    rig.drop("a")
    assert rig.num_free == 40 * len(windows)
