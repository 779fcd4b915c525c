"""A region, or the network to it, is lost and comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from edge.upstream import COME_BACK_S
from tests.fakes.events import read_all
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    hear,
    metric,
    nothing_in_flight,
    restart,
    sse_error,
    status_of,
    wait_ready,
    wait_served,
    world_over,
)
from tests.system.world import Shape, World, counted, edge_words, front_words, world

pytestmark = pytest.mark.system
BOTH = ("weur", "enam")
CROWDED = Shape(step_s=0.02, worker_flags=("--kv-tokens", "65536"))
SILENCE_S = 10.0  # after which a link whose peer says nothing is given up


@pytest.mark.slow
@pytest.mark.parametrize(
    "regions",
    [
        pytest.param(("weur",), id="only region"),
        pytest.param(BOTH, id="two regions", marks=pytest.mark.slow),
    ],
)
async def test_a_connection_cut_again_and_again_in_mid_stream(
    tmp_path: Path, regions: tuple[str, ...]
) -> None:
    """Case 14: cut after so many bytes, wherever that is in a frame: the stream is whole, once."""
    shape = Shape(regions=regions, step_s=0.01)
    async with world_over(tmp_path, shape) as (w, net):
        for num_bytes in (60, 333):
            heard = Heard()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hear, w, heard, "!", 60)
                await heard.until(2)
                net.back = num_bytes
            assert (heard.text, heard.errors, heard.num_done) == (counted("!", 60), [], 1)
            assert heard.usage["completion_tokens"] == 60
            net.back = 1 << 60
            await first_choice(w)
        assert net.num_cuts >= 2
        for name in regions:
            await w.settled(f"{name}-prefill", f"{name}-decode")
            await nothing_in_flight(w, name)


async def test_many_streams_wait_for_the_only_region_to_be_reached_again(tmp_path: Path) -> None:
    """Case 14: more than it takes to open its breaker; each is whole, once."""
    async with world_over(tmp_path, CROWDED) as (w, net):
        async with crowd(w) as all_heard:
            net.down = True
            net.cut()
            await anyio.sleep(0.5)
            net.down = False
        for heard in all_heard:
            assert (heard.text, heard.errors, heard.num_done) == (counted("!", 60), [], 1)
            assert heard.usage["completion_tokens"] == 60
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_many_streams_outlive_the_front_of_the_only_region(tmp_path: Path) -> None:
    """Case 14: if another is there soon enough; none ends without a word in any case."""
    async with world(tmp_path, CROWDED) as w:
        async with crowd(w) as all_heard:
            with anyio.move_on_after(COME_BACK_S / 2) as soon:
                await restart(w, "weur-front", front_words(w, "weur"))
                await wait_ready(w, w.processes["weur-front"])
        for heard in all_heard:
            assert heard.num_done == 1 - len(heard.errors)
            assert counted("!", 60).startswith(heard.text)
            if not soon.cancelled_caught:
                assert (heard.text, heard.errors) == (counted("!", 60), [])
        await wait_served(w)
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@asynccontextmanager
async def crowd(w: World) -> AsyncGenerator[list[Heard], None]:
    """Streams in their middle when the block begins, and at their ends after it."""
    all_heard = [Heard() for _ in range(12)]
    async with anyio.create_task_group() as tasks:
        for heard in all_heard:
            tasks.start_soon(hear, w, heard, "!", 60)
        for heard in all_heard:
            await heard.until(2)
        yield all_heard


async def test_a_stream_that_nobody_goes_on_with_ends_in_an_error(tmp_path: Path) -> None:
    """Case 14: never a silent [DONE]; one error event is the last."""
    async with world_over(tmp_path, Shape(step_s=0.02)) as (w, net):
        heard = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, heard, "!", 60)
            await heard.until(5)
            net.down = True
            net.cut()
        assert heard.num_done == 0
        assert "cannot be reached" in sse_error(heard)
        assert counted("!", 60).startswith(heard.text)
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)
        for _ in range(10):  # case 22: and who comes now is told at once when to come back
            with anyio.fail_after(PATIENCE_S):
                refused = await w.raw("A", 5)
            assert await status_of(refused) == (503, 7009)
            assert int(refused.headers["retry-after"]) >= 1
        net.down = False
        await first_choice(w)
        assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await w.settled("weur-prefill", "weur-decode")


@pytest.mark.slow
async def test_a_region_out_of_reach_is_left_alone_until_it_is_back(tmp_path: Path) -> None:
    """Case 22: connections refused: every request is answered elsewhere, few are tried in vain
    first, and the region is the first choice again when it is back."""
    async with world_over(tmp_path, Shape(regions=BOTH)) as (w, net):
        await first_choice(w)
        net.down = True
        net.cut()
        for _ in range(60):
            assert await served_by(w) == "enam"
        assert await metric(w, "edge", "edgefire_edge_failed_tries_total") <= 2 * 5
        net.down = False
        await first_choice(w)
        for _ in range(5):
            assert await served_by(w) == "weur"
        for name in BOTH:
            await w.settled(f"{name}-prefill", f"{name}-decode")
            await nothing_in_flight(w, name)


@pytest.mark.slow
async def test_who_calls_while_an_edge_starts_again_is_answered(tmp_path: Path) -> None:
    """They wait in the queue of its socket, and then until a region has said how it is."""
    async with world(tmp_path, Shape(regions=BOTH)) as w:
        await restart(w, "edge", edge_words(w, w.home / "fleet.toml"))
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(served_by, w)


@pytest.mark.slow
async def test_a_region_that_says_nothing_is_worked_around(tmp_path: Path) -> None:
    """Case 22: its front is paused, as in a partition: a stream goes on elsewhere, to the letter;
    later ones start there; and when it wakes up it serves again."""
    async with world(tmp_path, Shape(regions=BOTH, step_s=0.05)) as w:
        heard = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, heard, "!", 60)
            await heard.until(5)
            w.processes["weur-front"].pause()
            with anyio.fail_after(5 * SILENCE_S):
                while not heard.num_done:
                    await anyio.sleep(0.05)
        assert (heard.text, heard.errors, heard.num_done) == (counted("!", 60), [], 1)
        for _ in range(5):
            with anyio.fail_after(PATIENCE_S):
                assert await served_by(w) == "enam"
        w.processes["weur-front"].go_on()
        await first_choice(w)
        for name in BOTH:
            await w.settled(f"{name}-prefill", f"{name}-decode", within_s=PATIENCE_S)
            await nothing_in_flight(w, name)


async def served_by(w: World) -> str:
    async with w.stream("A", 3) as response:
        assert response.status_code == 200, await response.aread()
        assert (await read_all(response))[0] == "BCD"
        return str(response.headers["x-served-by"])


async def first_choice(w: World) -> None:
    """Until the nearest region answers again."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            answer = await w.raw("A", 1)
            if answer.status_code == 200 and answer.headers["x-served-by"] == "weur":
                return
            await anyio.sleep(0.05)
