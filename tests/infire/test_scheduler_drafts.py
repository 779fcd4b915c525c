"""Which rows get drafts, how many, and what becomes of them."""

from __future__ import annotations

import msgspec
import pytest

from infire.admission import Limits
from infire.plan import Row, StepPlan
from infire.request import Grammar, Sequence
from tests.fakes.sequences import counted, sequence, sequence_of
from tests.infire.scheduling import Rig, held_in

# The model counts 0 1 2 3 4 0 1 ... in the tests with this period.
PERIOD = 5
REPEATS = counted(0, 12, PERIOD)


def drafts(rig: Rig, steps: int = 1) -> list[tuple[int, ...]]:
    """Of the rows of the last of so many plans."""
    return [row.draft_ids for row in rig.plans(steps)[-1].rows]


def test_right_drafts_come_out_in_one_step() -> None:
    rig = Rig(period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 12))
    rig.step()
    plan = rig.plan()
    (row,) = plan.rows
    assert (row.start, row.num_new, row.ids, row.draft_ids) == (12, 1, (3,), (4, 0, 1))
    (step,) = rig.finish(plan)
    assert (step.ids, step.num_computed) == ((4, 0, 1, 2), 16)
    assert rig.run_out() == {"a": [3, 4, 0, 1, 2, 3, 4]}
    gauges = rig.scheduler.gauges()
    assert (gauges.output_tokens, gauges.step) == (12, 4)


def test_what_follows_a_wrong_draft_is_computed_again() -> None:
    """The prompt says that 1, 2 is followed by 3, 9, 9: the first is right."""
    rig = Rig()
    rig.scheduler.add(sequence_of("a", [0, 1, 2, 3, 9, 9, 0, 1], 5))
    rig.step()
    plan = rig.plan()
    assert plan.rows[0].draft_ids == (3, 9, 9)
    (step,) = rig.finish(plan)
    assert (step.ids, step.num_computed) == ((3, 4), 10)
    gauges = rig.scheduler.gauges()
    assert (gauges.draft_tokens_proposed, gauges.draft_tokens_accepted) == (3, 1)
    assert rig.run_out() == {"a": [5, 6]}


def test_a_stop_id_ends_a_run_of_right_drafts() -> None:
    rig = Rig(period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 9, stop_ids=(0,), hold=True))
    steps = [step for _ in range(2) for step in rig.step()]
    assert [(step.ids, step.finish) for step in steps] == [((3,), None), ((4, 0), "stop")]
    held = held_in(rig.scheduler, "a")
    assert held is not None
    assert held.num_computed == len(held.token_ids) - 1 == 14 - 0
    gauges = rig.scheduler.gauges()
    assert (gauges.draft_tokens_proposed, gauges.draft_tokens_accepted) == (3, 2)
    assert gauges.output_tokens == 3


@pytest.mark.parametrize(("max_tokens", "expected"), [(2, ()), (3, (4,)), (4, (4, 0))])
def test_drafts_leave_room_for_the_id_after_them(max_tokens: int, expected: object) -> None:
    rig = Rig(period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, max_tokens))
    assert drafts(rig, steps=2) == [expected]
    assert rig.scheduler.gauges().output_tokens == max_tokens


def test_an_answer_may_end_with_the_pool() -> None:
    rig = Rig(6, period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 12))
    assert rig.run_out() == {"a": counted(REPEATS[-1], 12, PERIOD)}
    assert rig.scheduler.gauges().draft_tokens_accepted > 0


def test_drafts_take_no_block_that_another_may_want() -> None:
    """With 12 ids and 3 blocks each, both want a block now; one is left, and nobody gives way."""
    rig = Rig(9, period=PERIOD)
    for name in "ab":
        rig.scheduler.add(sequence_of(name, REPEATS, 4))
    rig.step()
    plan = rig.plan()
    assert [len(row.new_blocks[0]) for row in plan.rows] == [1, 1]
    assert [row.draft_ids for row in plan.rows] == [(4, 0), (4, 0)]  # in the block it has
    rig.finish(plan)
    rig = Rig(8, period=PERIOD)
    for name in "ab":
        rig.scheduler.add(sequence_of(name, REPEATS[:11], 9))
    assert drafts(rig, steps=2) == [(), ()]
    rig.run_out()


def test_a_row_shares_what_a_small_step_has_left() -> None:
    for num_rows, expected in ((2, 6), (4, 3), (5, 2), (8, 1), (9, 0)):
        rig = Rig(200, period=PERIOD, max_running=9)
        for n in range(num_rows):
            rig.scheduler.add(sequence_of(f"r{n}", REPEATS, 60))
        most = max(len(row.draft_ids) for plan in rig.plans(8) for row in plan.rows)
        assert most == expected


def test_drafts_that_do_not_pay_are_not_made() -> None:
    """Half of the first drafts are expected to be right."""
    for seconds, expected in ((0.013, 3), (0.030, 1), (0.080, 0)):  # of a step of 16 tokens
        rig = Rig(200, period=PERIOD)
        for n in range(4):
            rig.scheduler.add(sequence_of(f"r{n}", REPEATS, 60))
        rig.plans(2)  # prompts
        for num_tokens, took in ((4, 0.010), (8, 0.011 if expected else 0.070), (16, seconds)) * 3:
            rig.scheduler.took(decoding(num_tokens), took)
        assert [len(ids) for ids in drafts(rig)] == [expected] * 4


def decoding(num_tokens: int) -> StepPlan:
    """A step with one token for each of so many rows."""
    row = Row(slot=0, start=9, num_new=1, ids=(1,), new_blocks=((),), sample=True)
    return StepPlan(step=1, rows=(row,) * num_tokens)


def test_prompts_do_not_tell_what_drafts_cost() -> None:
    rig = Rig(200, period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 60))
    plan = rig.plan()
    for _ in range(5):
        rig.scheduler.took(plan, 9.0)
    rig.finish(plan)
    assert len(drafts(rig)[0]) == 3


def test_no_drafts_beside_a_prompt() -> None:
    rig = Rig(64, period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 40))
    rig.step()
    rig.scheduler.add(sequence("prompt", prompt=Limits().max_drafted_tokens))
    assert drafts(rig) == [(), ()]
    assert drafts(rig)[0] != ()


def test_real_tokens_come_before_drafts() -> None:
    rig = Rig(64, period=PERIOD, max_step_tokens=3)
    rig.scheduler.add(sequence_of("a", REPEATS, 40))
    rig.plans(4)
    rig.scheduler.add(sequence("b", prompt=4))
    plans = rig.plans(3)
    sizes = [[(row.num_new, len(row.draft_ids)) for row in plan.rows] for plan in plans]
    assert sizes == [[(1, 0), (2, 0)], [(1, 0), (2, 0)], [(1, 0), (1, 0)]]


def asked(**changes: object) -> Sequence:
    seq = sequence_of("a", REPEATS, 9)
    sampling = {name: value for name, value in changes.items() if name != "grammar"}
    seq.sampling = msgspec.structs.replace(seq.sampling, **sampling)
    seq.grammar = changes.get("grammar")  # type: ignore[assignment]
    return seq


@pytest.mark.parametrize(
    "changes", [{"speculate": False}, {"logprobs": 0}, {"grammar": Grammar("regex", "a+")}]
)
def test_who_gets_no_drafts(changes: dict[str, object]) -> None:
    for seq, expected in ((asked(), 3), (asked(**changes), 0)):
        rig = Rig(period=PERIOD)
        rig.scheduler.add(seq)
        assert [len(ids) for ids in drafts(rig, steps=2)] == [expected]


def test_an_engine_may_have_no_drafts_at_all() -> None:
    rig = Rig(period=PERIOD, max_draft_ids=0)
    rig.scheduler.add(sequence_of("a", REPEATS, 40))
    rig.run_out()
    assert rig.scheduler.gauges().draft_tokens_proposed == 0


def test_dropped_in_flight_with_drafts() -> None:
    rig = Rig(period=PERIOD)
    rig.scheduler.add(sequence_of("a", REPEATS, 40))
    rig.step()
    plan = rig.plan()
    assert plan.rows[0].draft_ids
    rig.drop("a")
    assert rig.finish(plan) == []
    assert rig.num_free == 16
