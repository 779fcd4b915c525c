from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path

import msgspec
import pytest

from infire.admission import Limits, Refusal
from infire.blocks import BlockPool
from infire.plan import RowResult, StepPlan
from infire.request import Logprob, Step
from infire.scheduler import Scheduler
from routing.errors import Code
from tests.fakes.runner import CountingRunner, counting_layout, exported_kv
from tests.fakes.sequences import answer, sequence


class Rig:
    """A scheduler with a counting runner, checked after every act."""

    def __init__(
        self,
        num_blocks: int = 16,
        *,
        max_step_tokens: int = 32,
        max_running: int = 8,
        windows: Seq[int | None] = (None,),
        chunked: bool = False,
        context_window: int | None = None,
    ) -> None:
        self.layout = layout = counting_layout(block_tokens=4, windows=windows, chunked=chunked)
        self.pools = [BlockPool(num_blocks) for _ in windows]
        self.max_step_tokens = max_step_tokens
        limits = Limits(
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            context_window=context_window,
            vocab_size=256,
        )
        self.scheduler = Scheduler(self.pools, layout.groups, limits)
        self.runner = CountingRunner(layout, [num_blocks] * len(windows))

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert sum(row.num_new for row in plan.rows) <= self.max_step_tokens
        self.scheduler.check()
        return plan

    def finish(self, plan: StepPlan) -> list[Step]:
        steps = self.scheduler.commit(plan, self.runner.run(plan))
        self.scheduler.check()
        return steps

    def step(self) -> list[Step]:
        plan = self.plan()
        return self.finish(plan) if plan else []

    def plans(self, count: int) -> list[StepPlan]:
        """The plans of so many steps, all of them run."""
        plans = []
        for _ in range(count):
            plans.append(self.plan())
            self.finish(plans[-1])
        return plans

    def drop(self, request_id: str) -> None:
        self.scheduler.drop(request_id)
        self.scheduler.check()

    def run_out(self) -> dict[str, list[int]]:
        """Step until nothing can be computed; the ids of each request."""
        ids: dict[str, list[int]] = {}
        while plan := self.plan():
            for step in self.finish(plan):
                ids.setdefault(step.request_id, []).extend(step.ids)
        return ids

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for pool in self.pools)


def shape(plan: StepPlan) -> list[tuple[int, int]]:
    """Slot and number of tokens of each row."""
    return [(row.slot, row.num_new) for row in plan.rows]


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
    held = rig.scheduler.held("a")
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
    held = rig.scheduler.held("a")
    assert held is not None
    assert held.num_computed == 9
    rig.drop("a")
    assert rig.scheduler.held("a") is None
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


def test_the_youngest_gives_way_and_goes_to_the_head_of_the_queue() -> None:
    rig = Rig(6, max_running=2)
    for name in ("old", "young"):
        rig.scheduler.add(sequence(name, prompt=8, max_tokens=12))
    rig.scheduler.add(sequence("next", prompt=2, max_tokens=1))
    ids: dict[str, list[int]] = {}
    while not rig.scheduler.gauges().preemptions:
        for step in rig.step():
            ids.setdefault(step.request_id, []).extend(step.ids)
    assert [entry.seq.request_id for entry in rig.scheduler._tenants.waiting] == ["young", "next"]
    rest = rig.run_out()
    assert ids["young"] + rest["young"] == answer(8, 12)  # nothing is said twice
    assert rig.scheduler.gauges().prompt_tokens_computed == 8 + 8 + 8 + 2
    assert rig.num_free == 6


def test_low_priority_gives_way_before_young() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("low", prompt=8, max_tokens=14, priority=-1))
    rig.scheduler.add(sequence("old", prompt=8, max_tokens=14))
    rig.scheduler.add(sequence("young", prompt=8, max_tokens=14))
    while not rig.scheduler.gauges().preemptions:
        rig.step()
    assert rig.scheduler._entries["low"].seq.num_preempted == 1
    rig.run_out()
    assert rig.num_free == 8


def test_of_equals_the_least_preempted_gives_way() -> None:
    rig = Rig(12)
    for name in ("old", "middle", "young"):
        rig.scheduler.add(sequence(name, prompt=10, max_tokens=26))
    young = rig.scheduler._entries["young"].seq
    young.num_preempted = 1
    while not rig.scheduler.gauges().preemptions:
        rig.step()
    assert rig.scheduler._entries["middle"].seq.num_preempted == 1
    assert young.num_preempted == 1


def test_a_row_already_planned_leaves_the_plan_when_it_gives_way() -> None:
    """Rows one behind are planned first, but a prompt of higher priority needs the block."""
    rig = Rig(8, max_step_tokens=2)
    rig.scheduler.add(sequence("decodes", prompt=4, max_tokens=20))
    rig.step()
    rig.step()
    rig.scheduler.add(sequence("urgent", prompt=16, max_tokens=1, priority=1))
    plan = rig.plan()
    while len(plan.rows) == 2:
        rig.finish(plan)
        plan = rig.plan()
    assert [(row.slot, row.start) for row in plan.rows] == [(1, 12)]
    assert plan.closes == (0,)
    assert rig.scheduler.gauges().waiting == 1
    rig.finish(plan)
    assert rig.run_out()["urgent"] == answer(16, 1)
    assert rig.num_free == 8


def test_who_gave_way_computes_nothing_in_the_same_step(tmp_path: Path) -> None:
    """Two prompts are behind; the first takes the second's only block, and tokens are left over."""
    rig = Rig(8, max_step_tokens=4)
    rig.scheduler.add(sequence("first", prompt=14, priority=1), num_adopted=4)
    rig.scheduler.add(sequence("second", prompt=16), num_adopted=4)
    rig.scheduler.add(sequence("held", prompt=16, max_tokens=1, hold=True), num_adopted=15)
    for adoption in rig.scheduler.place():
        path = tmp_path / adoption.request_id
        path.write_bytes(exported_kv(rig.layout, range(adoption.num_tokens)))
        rig.runner.adopt(adoption.block_ids, adoption.num_tokens, str(path))
    starts = [[row.start for row in plan.rows] for plan in rig.plans(4)]
    assert starts == [[15, 4], [7], [11], [12]]
    assert rig.scheduler.gauges().preemptions == 1
    rig.drop("held")
    assert rig.run_out() == {"first": answer(14, 4)[1:], "second": answer(16, 4)}


def test_a_newcomer_must_leave_room_to_those_who_run() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("a", prompt=4, max_tokens=20))
    rig.step()
    rig.scheduler.add(sequence("b", prompt=24, max_tokens=1))  # 6 blocks: none left for `a`
    assert shape(rig.plan()) == [(0, 1)]
    rig.drop("a")


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("held", prompt=12, max_tokens=1, hold=True))
    rig.step()
    rig.scheduler.add(sequence("big", prompt=24, max_tokens=1))
    rig.scheduler.add(sequence("small", prompt=2, max_tokens=1))
    assert not rig.plan()
    rig.drop("held")
    assert rig.step()[0].request_id == "big"


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


class Walk:
    """A seeded random life of a scheduler, its answers compared with arithmetic."""

    def __init__(self, seed: int, tmp_path: Path, **rig) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(**rig)
        self.tmp_path = tmp_path
        self.expected: dict[str, list[int]] = {}  # requests on their way: what they still say
        self.held: set[str] = set()
        self.exports: list[tuple[Path, int]] = []
        self.num_finished = 0
        self.names = (f"r{n}" for n in count())
        self.paths: dict[str, Path] = {}

    def submit(self) -> None:
        if len(self.expected) > 12:
            return
        rng = self.rng
        name = next(self.names)
        prompt, generated = rng.randint(1, 20), rng.choice([0, 0, 0, rng.randint(1, 9)])
        max_tokens = generated + rng.randint(1, 20)
        seq = sequence(
            name,
            prompt=prompt,
            generated=generated,
            max_tokens=max_tokens,
            priority=rng.choice([0, 0, 0, -1, 1]),
            hold=rng.random() < 0.3,
        )
        self.rig.scheduler.add(seq)
        self.expected[name] = answer(prompt, max_tokens, generated=generated)

    def submit_adopted(self) -> None:
        if not self.exports or len(self.expected) > 12:
            return
        name = next(self.names)
        path, num_tokens = self.rng.choice(self.exports)
        behind = self.rng.randint(1, max(1, 51 - num_tokens) // 2)
        more = self.rng.randint(1, 52 - num_tokens - behind)
        # The KV may end anywhere: inside the prompt, at its end, in what was generated.
        prompt = self.rng.randint(1, num_tokens + behind)
        generated = num_tokens + behind - prompt
        seq = sequence(name, prompt=prompt, generated=generated, max_tokens=generated + more)
        self.rig.scheduler.add(seq, num_adopted=num_tokens)
        self.expected[name] = answer(prompt, generated + more, generated=generated)
        self.paths[name] = path

    def export(self) -> None:
        if not self.held:
            return
        name = self.rng.choice(sorted(self.held))
        seq = self.rig.scheduler.held(name)
        path = self.tmp_path / f"{name}-{len(self.exports)}"
        self.rig.runner.export(seq.block_ids, seq.num_computed, str(path))
        if seq.num_computed < 45:  # room for more in the smallest pool of these tests
            self.exports.append((path, seq.num_computed))

    def drop(self) -> None:
        if names := sorted(self.held or self.expected):
            name = self.rng.choice(names)
            self.rig.drop(name)
            self.expected.pop(name, None)
            self.held.discard(name)

    def step(self) -> bool:
        placed = self.rig.scheduler.place()
        for adoption in placed:
            if self.rng.random() < 0.1:  # the file turns out to be of no use
                self.rig.drop(adoption.request_id)
                del self.expected[adoption.request_id]
            else:
                path = self.paths[adoption.request_id]
                self.rig.runner.adopt(adoption.block_ids, adoption.num_tokens, str(path))
        self.rig.scheduler.check()
        plan = self.rig.plan()
        if not plan:
            return bool(placed)
        if self.rng.random() < 0.05:
            self.drop()  # while in flight
        for step in self.rig.finish(plan):
            self.take(step)
        return True

    def take(self, step: Step) -> None:
        expected = self.expected[step.request_id]
        assert list(step.ids) == expected[: len(step.ids)]
        del expected[: len(step.ids)]
        assert (step.finish == "length") == (not expected)
        if step.finish:
            self.num_finished += 1
            del self.expected[step.request_id]
            if self.rig.scheduler.held(step.request_id):
                self.held.add(step.request_id)

    def walk(self, num_acts: int) -> None:
        acts = (self.submit, self.submit_adopted, self.export, self.drop, self.step)
        for _ in range(num_acts):
            self.rng.choices(acts, weights=(4, 1, 1, 1, 12))[0]()
            self.rig.scheduler.check()

    def end(self) -> None:
        """Nobody is forgotten: with the holds gone, all the others finish."""
        for _ in range(10_000):
            for name in list(self.held):
                self.rig.drop(name)
            self.held.clear()
            if not self.step():
                break
        assert self.expected == {}
        assert self.rig.num_free == sum(pool.num_blocks for pool in self.rig.pools)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rig",
    [
        {"num_blocks": 100, "max_step_tokens": 16},
        {"num_blocks": 13, "max_step_tokens": 32},  # short of blocks: preempts
        {"num_blocks": 13, "max_step_tokens": 3},
        {"num_blocks": 14, "max_step_tokens": 5, "windows": (None, 6)},
        {"num_blocks": 7, "max_step_tokens": 7, "windows": (5, 1), "chunked": True},
    ],
    ids=lambda rig: "-".join(str(value) for value in rig.values()),
)
def test_random_lives(seed: int, rig, tmp_path: Path) -> None:
    walk = Walk(seed, tmp_path, **rig)
    walk.walk(600)
    walk.end()
    assert walk.num_finished > 20


def test_random_lives_do_preempt(tmp_path: Path) -> None:
    """The walks above mean little unless blocks run out in them."""
    walk = Walk(0, tmp_path, num_blocks=13, max_step_tokens=32)
    walk.walk(600)
    assert walk.rig.scheduler.gauges().preemptions > 3
