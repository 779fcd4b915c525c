"""Three times as many as a region takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import anyio
import pytest

from tests.system.faults import PATIENCE_S, metric, nothing_in_flight, status_of
from tests.system.world import Shape, counted, world

pytestmark = pytest.mark.system
MAX_RUNNING, MAX_WAITING = 4, 8
TAKEN = MAX_RUNNING + MAX_WAITING  # by each worker, about: reports lag a little


async def test_overload_is_refused_and_what_is_admitted_is_right(tmp_path: Path) -> None:
    """Case 19: 429 with a time for what the queue does not hold, at once; who is admitted has the
    whole answer; nothing is tried again and again; and then all is as before."""
    flags = ("--max-running", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING))
    async with world(tmp_path, Shape(step_s=0.01, worker_flags=flags)) as w:
        codes: Counter[int] = Counter()
        num_asked = 3 * 2 * TAKEN

        async def ask() -> None:
            answer = await w.raw("!", 40)
            codes[answer.status_code] += 1
            if answer.status_code == 200:
                assert answer.json()["result"]["response"] == counted("!", 40)
            else:
                assert await status_of(answer) == (429, 3040)
                assert int(answer.headers["retry-after"]) >= 1

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for _ in range(num_asked):
                    tasks.start_soon(ask)
        assert codes[200] >= MAX_RUNNING
        assert codes[429] > 0
        assert codes.total() == num_asked
        asked = await metric(w, "weur-front", "edgefire_front_requests_total")
        assert asked <= 2 * num_asked  # no storm: a refusal is final where there is one region
        for _ in range(5):
            assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def test_what_one_region_does_not_take_another_does(tmp_path: Path) -> None:
    """Case 19: the nearest is full, the next has room: nobody is refused."""
    flags = ("--max-running", "2", "--max-waiting", "4")
    shape = Shape(regions=("weur", "enam"), roles=("both",), step_s=0.01, worker_flags=flags)
    async with world(tmp_path, shape) as w:
        served: Counter[str] = Counter()

        async def ask() -> None:
            answer = await w.raw("!", 60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["result"]["response"] == counted("!", 60)
            served[answer.headers["x-served-by"]] += 1

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for _ in range(9):
                    tasks.start_soon(ask)
        assert set(served) == {"weur", "enam"}
        await w.settled("weur-both", "enam-both")
        for name in shape.regions:
            await nothing_in_flight(w, name)
