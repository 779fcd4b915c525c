"""Engines that hang, and engines that are not there yet."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx2
import pytest

from tests.system.faults import (
    PATIENCE_S,
    Heard,
    faulty_words,
    hear,
    nothing_in_flight,
    restart,
    status_of,
    wait_served,
)
from tests.system.procs import engines, wait_ready
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
STUCK_S = 2.0  # instead of a minute
FRESH_S = 5.0  # silent for longer, an engine gets no more work


@pytest.mark.slow
async def test_a_hung_engine_is_left_alone_and_replaced(tmp_path: Path) -> None:
    """Case 18: stopped in mid-stream while its worker lives: the stream goes on to the letter, and
    another engine takes its place."""
    shape = Shape(step_s=0.02, worker_flags=("--stuck-s", str(STUCK_S)))
    async with world(tmp_path, shape) as w:
        before = await w.worker("weur-decode")
        [engine] = engines(w.processes["weur-decode"])
        heard = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, heard, "!", 60)
            await heard.until(5)
            engine.suspend()
            with anyio.fail_after(5 * STUCK_S):
                while not heard.num_done:
                    await anyio.sleep(0.02)
        assert (heard.text, heard.errors, heard.num_done) == (counted("!", 60), [], 1)
        await wait_ready(w, w.processes["weur-decode"])
        assert (await w.worker("weur-decode")).epoch != before.epoch
        assert engine.pid not in {it.pid for it in engines(w.processes["weur-decode"])}
        await wait_served(w)
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_no_work_goes_to_an_engine_that_hangs(tmp_path: Path) -> None:
    """Case 18: until it is replaced, its worker is not ready, and the next region serves."""
    shape = Shape(regions=("weur", "enam"), roles=("both",))
    async with world(tmp_path, shape) as w:
        [engine] = engines(w.processes["weur-both"])
        engine.suspend()
        with anyio.fail_after(5 * FRESH_S):
            while await ready(w, "weur-both") or await ready(w, "weur-front"):
                await anyio.sleep(0.05)
        for _ in range(5):
            with anyio.fail_after(PATIENCE_S):
                answer = await w.raw("A", 5)
            assert answer.json()["result"]["response"] == "BCDEF"
            assert answer.headers["x-served-by"] == "enam"
        assert await ready(w, "weur-both") is False
        engine.resume()
        with anyio.fail_after(PATIENCE_S):
            while (await w.raw("A", 1)).headers["x-served-by"] != "weur":
                await anyio.sleep(0.05)
        for name in ("weur", "enam"):
            await w.settled(f"{name}-both")
            await nothing_in_flight(w, name)


async def test_a_cold_model_is_loaded_once_whoever_asks(tmp_path: Path) -> None:
    """Case 23: 100 ask while the only workers load: 503 with a time to come back, at once; one
    load each, and then every one is answered."""
    # Nobody is held until it is loaded; of those after that, a slow machine would refuse some.
    shape = Shape(edge_flags=("--cold-s", "0"), front_flags=("--max-wait-s", "0"))
    async with world(tmp_path, shape) as w:
        starts, loaded = tmp_path / "starts", tmp_path / "loaded"
        for role in ("prefill", "decode"):
            flags = ["--load-gate", str(loaded), "--starts", str(starts)]
            await restart(w, f"weur-{role}", faulty_words(w, role, *flags))
        with anyio.fail_after(PATIENCE_S):
            while (await w.raw("A", 1)).status_code != 503:
                await anyio.sleep(0.01)
        for answer in await crowd(w):
            assert await status_of(answer) == (503, 7009)
            assert int(answer.headers["retry-after"]) >= 1
        loaded.touch()
        await wait_served(w)
        for answer in await crowd(w):
            assert answer.status_code == 200, answer.text
            assert answer.json()["result"]["response"] == "BCDEF"
        assert starts.read_text().count("start") == 2
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def crowd(w: World) -> list[httpx2.Response]:
    answers: list[httpx2.Response] = []

    async def ask() -> None:
        answers.append(await w.raw("A", 5))

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(ask)
    assert len(answers) == 100
    return answers


async def ready(w: World, name: str) -> bool:
    return (await w.client.get(f"{w.processes[name].url}/ready")).status_code == 200
