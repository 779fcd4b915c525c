"""Three times as many as a region takes, and requests that wait for nobody."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import anyio
import pytest

from origin_gpu.waits import LEAST_WAIT_S
from tests.fakes.events import read_all
from tests.system.faults import PATIENCE_S, metric, nothing_in_flight, status_of
from tests.system.world import ACCOUNT, Shape, World, counted, edge_key, world

pytestmark = pytest.mark.system
MAX_RUNNING, MAX_WAITING = 4, 8
TAKEN = MAX_RUNNING + MAX_WAITING  # by each worker, about: reports lag a little
REFUSED_WITHIN_S = 0.25  # five times what it should take: machines are busy


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


@pytest.mark.slow
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


@pytest.mark.slow
async def test_who_will_not_wait_is_refused_at_once(tmp_path: Path) -> None:
    """`rejectIfBusy`: all rows are taken, and others wait; it gets its 429 before these end."""
    shape = Shape(step_s=0.01, roles=("both",), worker_flags=("--max-running", "2"))
    async with world(tmp_path, shape) as w, anyio.create_task_group() as tasks:
        busy = {"options": {"rejectIfBusy": True}}
        assert (await w.raw("A", 3, **busy)).json()["result"]["response"] == "BCD"

        async def ask() -> None:
            nonlocal left
            answer = await w.raw("!", 90)
            assert answer.json()["result"]["response"] == counted("!", 90)
            left -= 1

        left = 6
        for _ in range(left):
            tasks.start_soon(ask)
        with anyio.fail_after(PATIENCE_S):
            while (await w.worker("weur-both")).waiting < 4:
                await anyio.sleep(0.01)
        for prompt in ("A", "B", "C"):
            answer = await w.raw(prompt, 3, **busy)
            assert left > 2
            assert await status_of(answer) == (429, 3040)
            assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.slow
async def test_work_for_idle_times_gives_way_and_goes_on(tmp_path: Path) -> None:
    """A key of priority -1 has the only row; another's request takes it, and then it has it again.
    While that runs, nothing more of priority -1 is let in."""
    shape = Shape(step_s=0.01, roles=("both",), worker_flags=("--max-running", "1"))
    async with world(tmp_path, shape) as w:
        usual = w.key
        idle = edge_key(w.home, "create", "--account", ACCOUNT, "--priority", "-1")
        ends: list[str] = []

        async def ask(key: str, prompt: str, num_tokens: int) -> None:
            w.key = key
            answer = await w.raw(prompt, num_tokens)
            assert answer.json()["result"]["response"] == counted(prompt, num_tokens)
            ends.append(prompt)

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, idle, "!", 90)
                while not (await w.worker("weur-both")).in_flight:
                    await anyio.sleep(0.01)
                tasks.start_soon(ask, usual, "A", 60)
                while (await w.worker("weur-both")).in_flight < 2:
                    await anyio.sleep(0.005)
                w.key = idle
                assert await status_of(await w.raw("B", 3)) == (429, 3040)
        assert ends == ["A", "!"]
        await w.settled("weur-both")


@dataclass
class _Offered:
    """What became of requests that came at their times, whatever became of those before."""

    codes: Counter[int] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)  # of those let in
    refused_s: list[float] = field(default_factory=list)

    async def ask(self, w: World, num_tokens: int) -> None:
        began = time.monotonic()
        async with w.stream("!", num_tokens) as answer:
            self.codes[answer.status_code] += 1
            if answer.status_code == 200:
                self.first_s.append(time.monotonic() - began)
                text, usage, done = await read_all(answer)
                assert (text, done) == (counted("!", num_tokens), True)
                assert usage["completion_tokens"] == num_tokens
            else:
                self.refused_s.append(time.monotonic() - began)
                await answer.aread()
                assert await status_of(answer) == (429, 3040)
                assert int(answer.headers["retry-after"]) >= 1


async def _offer(w: World, *, rate: float, for_s: float, num_tokens: int) -> _Offered:
    """Requests at random times, `rate` a second."""
    random, offered = Random(rate), _Offered()
    async with anyio.create_task_group() as tasks:
        end = time.monotonic() + for_s
        while time.monotonic() < end:
            tasks.start_soon(offered.ask, w, num_tokens)
            await anyio.sleep(random.expovariate(rate))
    return offered


@pytest.mark.slow
async def test_the_line_is_as_long_as_it_may_take_not_as_its_places(tmp_path: Path) -> None:
    """256 may wait by number; at three times what two rows do, no more wait than a second's."""
    shape = Shape(step_s=0.01, roles=("both",), worker_flags=("--max-running", "2"))
    async with world(tmp_path, shape) as w:
        with anyio.fail_after(2 * PATIENCE_S):
            offered = await _offer(w, rate=30, for_s=6, num_tokens=20)  # about 10 a second fit
        assert set(offered.codes) == {200, 429}
        assert offered.codes[200] >= 30
        assert _median(offered.refused_s) < REFUSED_WITHIN_S
        # of 256 places the last would have to wait 25 s
        assert max(offered.first_s) < 5 * LEAST_WAIT_S
        await w.settled("weur-both")
        await nothing_in_flight(w)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
