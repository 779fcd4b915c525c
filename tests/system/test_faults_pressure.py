"""More is asked for than the KV has room for."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.system.faults import PATIENCE_S, Heard, hear, metric, nothing_in_flight, status_of
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
BLOCK = 16
LONG = 90  # tokens of the longest answers that are text
# Room for one and a half long requests.
TIGHT = ("--kv-tokens", str(BLOCK * 10), "--max-running", "16")
MOST_PREEMPTIONS = 20  # of one request: each begins again with all it has made


async def test_what_can_never_fit_is_refused_at_once(tmp_path: Path) -> None:
    """Case 10: in a pool of 256 tokens, under a window of 8192; who queues behind it goes on."""
    flags = ("--kv-tokens", "256", "--max-running", "1")
    async with world(tmp_path, Shape(step_s=0.01, worker_flags=flags)) as w:
        ahead, behind = Heard(), Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, ahead, "!", 60)
            await ahead.until(1)
            refused = await w.raw("A" * 300, 4)
            assert await status_of(refused) == (400, 5006)
            assert "300" in refused.text
            tasks.start_soon(hear, w, behind, "0", 20)
        assert (ahead.text, behind.text) == (counted("!", 60), counted("0", 20))
        longest = await w.raw("A" * 200, 4000)  # as much as fits, and no more
        assert longest.status_code == 200
        assert longest.json()["result"]["usage"]["total_tokens"] <= 256
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def test_long_requests_under_pressure_all_finish(tmp_path: Path) -> None:
    """Case 11: a pool for one and a half: each has the answer it has alone, none starves, none is
    preempted without end, and small ones pass."""
    shape = Shape(roles=("both",), step_s=0.002, worker_flags=TIGHT)
    async with world(tmp_path, shape) as w:
        long = [Heard() for _ in range(6)]
        small = [Heard() for _ in range(6)]
        with anyio.fail_after(2 * PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for n, heard in enumerate(long):
                    tasks.start_soon(hear, w, heard, "A" * n + "!", LONG)
                await long[0].until(1)
                for n, heard in enumerate(small):
                    tasks.start_soon(hear, w, heard, "A" * n + "0", 4)
        for n, heard in enumerate(long):
            assert (heard.text, heard.num_done) == (counted("!", LONG), 1), n
            assert heard.usage["completion_tokens"] == LONG
        assert [heard.text for heard in small] == [counted("0", 4)] * 6
        preemptions = await metric(w, "weur-both", "edgefire_engine_preemptions_total")
        assert 0 < preemptions <= MOST_PREEMPTIONS * len(long)
        await w.settled("weur-both")
        await nothing_in_flight(w)


async def test_leaving_while_preempted_or_queued_frees_everything(tmp_path: Path) -> None:
    """Case 12: all but one hang up, some preempted, some never started; that one has its answer."""
    shape = Shape(roles=("both",), step_s=0.01, worker_flags=TIGHT)
    async with world(tmp_path, shape) as w:
        stays = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, stays, "!", LONG)
            await stays.until(1)
            async with anyio.create_task_group() as leaving:
                for n in range(12):
                    leaving.start_soon(hear, w, Heard(), "A" * n + "!", LONG)
                await preempted_and_queued(w)
                leaving.cancel_scope.cancel()
            with anyio.fail_after(PATIENCE_S):
                while (await w.worker("weur-both")).in_flight > 1:
                    await anyio.sleep(0.005)
            made = await metric(w, "weur-both", "edgefire_engine_output_tokens_total")
        assert (stays.text, stays.num_done) == (counted("!", LONG), 1)
        await w.settled("weur-both")
        made = await metric(w, "weur-both", "edgefire_engine_output_tokens_total") - made
        assert made <= LONG + 12 * 5  # of who stays, and a few steps of those who left
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_leaving_while_the_kv_waits_for_blocks(tmp_path: Path) -> None:
    """Case 12: handed over to a decode worker whose pool is taken: file and hold go too."""
    flags = ("--kv-tokens", str(BLOCK * 10), "--lease-s", "600")
    async with world(tmp_path, Shape(step_s=0.02, worker_flags=flags)) as w:
        stays = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, stays, "A" * 60 + "!", LONG)
            await stays.until(40)
            async with anyio.create_task_group() as leaving:
                for _ in range(3):
                    leaving.start_soon(hear, w, Heard(), "B" * 120 + "!", 30)
                with anyio.fail_after(PATIENCE_S):
                    while not (await w.worker("weur-decode")).waiting:
                        await anyio.sleep(0.002)
                leaving.cancel_scope.cancel()
        assert (stays.text, stays.num_done) == (counted("!", LONG), 1)
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def preempted_and_queued(w: World) -> None:
    with anyio.fail_after(PATIENCE_S):
        while True:
            preemptions = await metric(w, "weur-both", "edgefire_engine_preemptions_total")
            if preemptions and (await w.worker("weur-both")).waiting > 1:
                return
            await anyio.sleep(0.002)
