"""Seeded random lives of a scheduler, every answer compared with arithmetic."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from infire.request import Step
from infire.tenants import MAX_PREEMPTIONS
from tests.fakes.runner import VOCABULARY
from tests.fakes.sequences import counted, sequence_of
from tests.infire.scheduling import Rig, held_in


class Walk:
    """A seeded random life of a scheduler, its answers compared with arithmetic.

    With a short period the model repeats itself, and prompts of few different ids mislead: drafts
    are then right and wrong by turns.
    """

    def __init__(self, seed: int, tmp_path: Path, *, period: int = VOCABULARY, **rig: Any) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(period=period, **{"prefix_cache": True, **rig})
        self.period = period
        self.tmp_path = tmp_path
        self.expected: dict[str, list[int]] = {}  # requests on their way: what they still say
        self.held: set[str] = set()
        self.exports: list[tuple[Path, list[int]]] = []
        self.answers: dict[str, list[int]] = {}  # of those that finished
        self.num_finished = 0
        self.names = (f"r{n}" for n in count())
        self.paths: dict[str, Path] = {}

    def submit(self) -> None:
        if len(self.expected) > 12:
            return
        rng = self.rng
        num_prompt, num_generated = rng.randint(1, 20), rng.choice([0, 0, 0, rng.randint(1, 9)])
        self.add(self.some_ids(num_prompt + num_generated), num_prompt, rng.randint(1, 20))

    def some_ids(self, num_ids: int) -> list[int]:
        """As the model counts, or of few different ids."""
        first = self.rng.randrange(self.period)
        if self.rng.random() < 0.5:
            return counted(first, num_ids, self.period)
        return [first % 3, *self.rng.choices(range(3), k=num_ids)][:num_ids]

    def add(self, ids: list[int], num_prompt: int, num_more: int, num_adopted: int = 0) -> str:
        rng = self.rng
        name = next(self.names)
        expected = counted(ids[-1], num_more, self.period)
        stop_ids = tuple(rng.sample(range(self.period), rng.choice([0, 0, 1])))
        if stop_ids and stop_ids[0] in expected:
            del expected[expected.index(stop_ids[0]) + 1 :]
        seq = sequence_of(
            name,
            ids,
            len(ids) - num_prompt + num_more,
            num_prompt=num_prompt,
            stop_ids=stop_ids,
            priority=rng.choice([0, 0, 0, -1, 1]),
            hold=not num_adopted and rng.random() < 0.3,
        )
        self.rig.scheduler.add(seq, num_adopted)
        self.expected[name] = expected
        self.answers[name] = []
        return name

    def submit_adopted(self) -> None:
        if not self.exports or len(self.expected) > 12:
            return
        path, ids = self.rng.choice(self.exports)
        num_tokens = len(ids)
        behind = self.rng.randint(1, max(1, 51 - num_tokens) // 2)
        more = self.rng.randint(1, 52 - num_tokens - behind)
        # The KV may end anywhere: inside the prompt, at its end, in what was generated.
        prompt = self.rng.randint(1, num_tokens + behind)
        name = self.add([*ids, *self.some_ids(behind)], prompt, more, num_tokens)
        self.paths[name] = path

    def export(self) -> None:
        if not self.held:
            return
        name = self.rng.choice(sorted(self.held))
        seq = held_in(self.rig.scheduler, name)
        path = self.tmp_path / f"{name}-{len(self.exports)}"
        self.rig.runner.export(seq.block_ids, seq.num_computed, str(path))
        if seq.num_computed < 45:  # room for more in the smallest pool of these tests
            self.exports.append((path, seq.token_ids[: seq.num_computed]))

    def drop(self) -> None:
        if names := sorted(self.held or self.expected):
            name = self.rng.choice(names)
            self.rig.drop(name)
            self.expected.pop(name, None)
            if name not in self.held:
                del self.answers[name]
            self.held.discard(name)

    def step(self) -> bool:
        placed = self.rig.scheduler.place()
        for adoption in placed:
            if self.rng.random() < 0.1:  # the file turns out to be of no use
                self.rig.drop(adoption.request_id)
                del self.expected[adoption.request_id], self.answers[adoption.request_id]
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
        self.answers[step.request_id] += step.ids
        assert bool(step.finish) == (not expected)
        if step.finish:
            self.num_finished += 1
            del self.expected[step.request_id]
            if held_in(self.rig.scheduler, step.request_id):
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


RIGS: list[dict[str, Any]] = [
    {"num_blocks": 100, "max_step_tokens": 16},
    {"num_blocks": 13, "max_step_tokens": 32},  # short of blocks: preempts
    {"num_blocks": 13, "max_step_tokens": 3},
    {"num_blocks": 13, "max_step_tokens": 7, "prefix_cache": False},
    {"num_blocks": 14, "max_step_tokens": 5, "windows": (None, 6)},
    {"num_blocks": 7, "max_step_tokens": 7, "windows": (5, 1), "chunked": True},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("period", [VOCABULARY, 5])
@pytest.mark.parametrize("rig", RIGS, ids=lambda rig: "-".join(map(str, rig.values())))
def test_random_lives(seed: int, period: int, rig: dict[str, Any], tmp_path: Path) -> None:
    walk = Walk(seed, tmp_path, period=period, **rig)
    walk.walk(600)
    walk.end()
    assert walk.num_finished > 20


def test_random_lives_do_preempt_and_do_draft(tmp_path: Path) -> None:
    """The walks above mean little unless blocks run out in them, and drafts are right and wrong."""
    walk = Walk(0, tmp_path, period=5, num_blocks=13, max_step_tokens=32)
    walk.walk(600)
    gauges = walk.rig.scheduler.gauges()
    assert gauges.preemptions > 3
    assert 20 < gauges.draft_tokens_accepted < gauges.draft_tokens_proposed - 20
    assert gauges.output_tokens > gauges.draft_tokens_accepted


@pytest.mark.parametrize("seed", range(4))
def test_short_of_blocks_everyone_finishes_and_gives_way_a_bounded_number_of_times(
    seed: int,
) -> None:
    """Many long answers in few blocks, with more urgent ones all the time."""
    rng = random.Random(seed)
    rig = Rig(20, max_step_tokens=16, period=7)
    expected: dict[str, list[int]] = {}
    names = (f"r{n}" for n in count())
    most_preempted = 0
    for num_steps in range(5000):
        if num_steps < 150:
            for _ in range(rng.choice((0, 0, 3))):
                name, num_prompt = next(names), rng.randint(1, 24)
                num_more = rng.randint(1, 56)
                prompt = rng.choices(range(7), k=num_prompt)
                priority = rng.choice((-1, 0, 0, 2))
                rig.scheduler.add(sequence_of(name, prompt, num_more, priority=priority))
                expected[name] = counted(prompt[-1], num_more, 7)
        seqs = {name: rig.scheduler._entries[name].seq for name in expected}
        gained = rig.step()
        most_preempted = max([most_preempted, *(seq.num_preempted for seq in seqs.values())])
        for step in gained:
            assert list(step.ids) == expected[step.request_id][: len(step.ids)]
            del expected[step.request_id][: len(step.ids)]
            if step.finish:
                assert expected.pop(step.request_id) == []
    assert expected == {}
    assert most_preempted == MAX_PREEMPTIONS
    assert rig.num_free == 20


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rig", RIGS, ids=lambda rig: "-".join(map(str, rig.values())))
def test_drafts_change_no_answer(seed: int, rig: dict[str, Any]) -> None:
    """The same requests with drafts and without, in few blocks and in many."""
    without, drafting = (Rig(period=5, max_draft_ids=count, **rig) for count in (0, 6))
    answers = []
    for each in (without, drafting):
        rng = random.Random(seed)
        for n in range(8):
            prompt = rng.choices(range(5), k=rng.randint(1, 12))
            stop_ids = rng.choice([(), (rng.randrange(5),)])
            more, priority = rng.randint(1, 30), rng.choice((0, 1))
            each.scheduler.add(
                sequence_of(f"r{n}", prompt, more, stop_ids=stop_ids, priority=priority)
            )
        answers.append(each.run_out())
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
    assert without.scheduler.gauges().draft_tokens_proposed == 0
    assert drafting.scheduler.gauges().draft_tokens_proposed > 0
