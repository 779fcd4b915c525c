"""A scheduler with the counting runner, and what tests of it have in common."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.plan import StepPlan
from infire.request import Sequence, Step
from infire.scheduler import Scheduler
from tests.fakes.runner import VOCABULARY, CountingRunner, counting_layout


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
        max_draft_ids: int = 6,
        period: int = VOCABULARY,
        prefix_cache: bool = False,
    ) -> None:
        self.layout = layout = counting_layout(block_tokens=4, windows=windows, chunked=chunked)
        self.pools = [BlockPool(num_blocks) for _ in windows]
        self.max_step_tokens = max_step_tokens
        limits = Limits(
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            context_window=context_window,
            vocab_size=VOCABULARY,
            max_draft_ids=max_draft_ids,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(self.pools, layout.groups, limits)
        self.runner = CountingRunner(layout, [num_blocks] * len(windows), period=period)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        num_new = sum(row.num_new for row in plan.rows)
        num_drafts = sum(len(row.draft_ids) for row in plan.rows)
        assert num_new + num_drafts <= self.max_step_tokens
        assert not num_drafts or num_new + num_drafts <= Limits().max_drafted_tokens
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


def held_in(scheduler: Scheduler, request_id: str) -> Sequence | None:
    """A finished sequence whose blocks are kept until it is dropped, and are still its own."""
    entry = scheduler._held.get(request_id)
    return entry.seq if entry and scheduler._tenants.owns(entry) else None
