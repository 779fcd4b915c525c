"""Case 23: a model that nobody has loaded yet, and weights that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx2
import pytest

from tests.system.faults import PATIENCE_S, faulty_words, restart
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
WORKERS = ("weur-prefill", "weur-decode")
HOLD_S = 1.0  # that the second test has requests wait


async def load_anew(w: World, load_s: float) -> list[Path]:
    """Both workers begin again, and take so long to load; files with a line for each start."""
    assert (await w.raw("A", 1)).status_code == 200  # the edge is no longer a new one, which waits
    starts = []
    for name in WORKERS:
        starts.append(w.home / f"{name}-starts")
        flags = ("--slow-load-s", str(load_s), "--starts", str(starts[-1]))
        await restart(w, name, faulty_words(w, name.partition("-")[2], *flags))
    with anyio.fail_after(PATIENCE_S):
        while (await w.region("weur")).models or not (await w.region("weur")).loading:
            await anyio.sleep(0.01)
    await anyio.sleep(1.5)  # the edge asks each second
    return starts


async def ask_all(w: World, count: int) -> list[httpx2.Response]:
    answers: list[httpx2.Response] = []

    async def ask() -> None:
        answers.append(await w.raw("A", 5))

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(ask)
    return answers


async def test_a_hundred_first_requests_wait_for_one_load(tmp_path: Path) -> None:
    shape = Shape(front_flags=("--max-wait-s", "0"))  # a line as long as it gets
    async with world(tmp_path, shape) as w:
        starts = await load_anew(w, 4.0)
        with anyio.fail_after(PATIENCE_S):
            answers = await ask_all(w, 100)
        assert {it.status_code for it in answers} == {200}
        assert {it.json()["result"]["response"] for it in answers} == {counted("A", 5)}
        assert [path.read_text().count("start") for path in starts] == [1, 1]
        await w.settled(*WORKERS)


@pytest.mark.slow
async def test_who_has_waited_long_enough_is_told_when_to_come_back(tmp_path: Path) -> None:
    """And the worker that is loading goes on with that."""
    shape = Shape(edge_flags=("--cold-s", str(HOLD_S)))
    async with world(tmp_path, shape) as w:
        starts = await load_anew(w, 8.0)
        with anyio.fail_after(5 * HOLD_S):
            answers = await ask_all(w, 100)
        assert {it.status_code for it in answers} == {503}
        assert all(int(it.headers["retry-after"]) >= 1 for it in answers)
        assert {it.json()["errors"][0]["code"] for it in answers} == {7009}
        with anyio.fail_after(PATIENCE_S):
            while (await w.raw("A", 5)).status_code != 200:
                await anyio.sleep(0.1)
        assert [path.read_text().count("start") for path in starts] == [1, 1]


@pytest.mark.slow
async def test_a_model_that_nobody_will_ever_serve_is_unknown_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await load_anew(w, 4.0)
        with anyio.fail_after(3.5):  # before anything is loaded
            body = {"prompt": "A", "raw": True}
            url = w.run_url("@cf/nobody/nothing")
            answer = await w.client.post(url, json=body, headers=w.headers())
        assert answer.status_code == 400
        assert answer.json()["errors"][0]["code"] == 5007
