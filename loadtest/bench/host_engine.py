"""An engine process whose runner sleeps like a GPU: the flags and the notes of `infire serve`.

    python -m loadtest.bench.host_engine --step-s 0.012 --tally FILE --fd N --model NAME ...

Scheduler, engine and loop are the real ones. What the scheduler costs is timed here, by a subclass,
so an engine that serves pays nothing for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence as Seq
from pathlib import Path

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.kv_layout import KVGroup
from infire.notes import Hello
from infire.plan import RowResult, StepPlan
from infire.request import Step
from infire.scheduler import Adoption, Scheduler
from infire.serve import serve_process
from loadtest.bench.engine_parts import engine_flags, hello_of, layout_of, limits_of
from loadtest.bench.host_clock import Tally, shared_tally
from loadtest.bench.host_model import END_ID, FIRST_WORD

DTYPE = "bfloat16"


class SleepingRunner:
    """`infire.plan.Runner` that takes `step_s` a step, and makes up words."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._words = [RowResult((token_id,)) for token_id in range(FIRST_WORD, END_ID)]
        self._nothing = RowResult()

    def run(self, plan: StepPlan) -> list[RowResult]:
        began = time.monotonic()
        words, nothing, count = self._words, self._nothing, len(self._words)
        results = [
            words[(31 * row.slot + row.start) % count] if row.sample else nothing
            for row in plan.rows
        ]
        time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        return results

    def save(self, block: int) -> bytes:
        raise NotImplementedError

    def load(self, block: int, content: bytes) -> None:
        raise NotImplementedError

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        raise OSError("there is no KV here")

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        raise OSError("there is no KV here")


class TimedScheduler(Scheduler):
    """The scheduler, with the CPU time of its thread inside `place`, `plan` and `commit` told."""

    def __init__(self, pools: Seq[BlockPool], groups: Seq[KVGroup], limits: Limits) -> None:
        super().__init__(pools, groups, limits)
        self.tally: Tally | None = None
        self._spent_ns = 0

    def place(self) -> list[Adoption]:
        began = time.thread_time_ns()
        placed = super().place()
        self._spent_ns += time.thread_time_ns() - began
        return placed

    def plan(self) -> StepPlan:
        began = time.thread_time_ns()
        plan = super().plan()
        self._spent_ns += time.thread_time_ns() - began
        return plan

    def commit(self, plan: StepPlan, results: Seq[RowResult]) -> list[Step]:
        began = time.thread_time_ns()
        steps = super().commit(plan, results)
        self._spent_ns += time.thread_time_ns() - began
        if self.tally is not None:
            self.tally.tell(os.getpid(), self._spent_ns, self.gauges().output_tokens)
        return steps


def sleeping_engine(
    *, model: str, kv_tokens: int, block_tokens: int, limits: Limits, step_s: float, tally: Tally
) -> tuple[Hello, Engine]:
    """An engine that sleeps, and what it says of itself."""
    layout = layout_of(model, block_tokens=block_tokens, dtype=DTYPE)
    scheduler = TimedScheduler([BlockPool(kv_tokens // block_tokens)], layout.groups, limits)
    scheduler.tally = tally
    hello = hello_of(model, layout, scheduler, device="none: it sleeps")
    return hello, Engine(scheduler, SleepingRunner(step_s))


def main() -> None:
    flags = engine_flags()
    flags.add_argument("--tally", type=Path, required=True, help="file that tells what was done")
    given, _ = flags.parse_known_args()  # the others are about computing
    with shared_tally(given.tally) as tally:
        serve_process(
            given.fd,
            lambda: sleeping_engine(
                model=given.model,
                kv_tokens=given.kv_tokens,
                block_tokens=given.block_tokens,
                limits=limits_of(given),
                step_s=given.step_s,
                tally=tally,
            ),
        )


if __name__ == "__main__":
    main()
