"""Prefix caches, and who knows of them: a hint that is right saves time, a wrong one costs some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from routing import wire
from routing.link import Link
from tests.system.faults import (
    PATIENCE_S,
    metric,
    nothing_in_flight,
    request_to,
    restart,
    wait_metric,
    wait_served,
)
from tests.system.procs import wait_ready
from tests.system.world import Shape, World, counted, start, world

pytestmark = pytest.mark.system
TWO_PREFILL = Shape(roles=("prefill", "prefill-2", "decode"))
PREFILL = ("weur-prefill", "weur-prefill-2")
PROMPT = "A" * 70  # four blocks of 16 and a bit


async def ask(w: World, prompt: str = PROMPT) -> int:
    """Tokens of the prompt that were cached, the answer being right."""
    answer = (await w.raw(prompt, 20)).json()
    assert answer["result"]["response"] == counted(prompt[-1], 20), answer
    details: dict[str, Any] = answer["result"]["usage"].get("prompt_tokens_details", {})
    return int(details.get("cached_tokens", 0))


async def computed(w: World) -> list[int]:
    """Prompt tokens that each prefill worker has computed so far."""
    return [(await w.worker(name)).prompt_tokens_computed for name in PREFILL]


async def known(w: World, front: str = "weur-front") -> float:
    """Blocks that the front takes the prefill workers to have cached."""
    name = "edgefire_front_worker_cached_blocks"
    return sum([await metric(w, front, name, worker=worker) for worker in PREFILL])


async def wait_known(w: World, num_blocks: int, front: str = "weur-front") -> None:
    with anyio.fail_after(PATIENCE_S):
        while await known(w, front) != num_blocks:
            await anyio.sleep(0.01)


async def test_a_prompt_goes_where_it_is_cached_and_its_client_is_told(tmp_path: Path) -> None:
    async with world(tmp_path, TWO_PREFILL) as w:
        assert await ask(w) == 0
        await wait_known(w, 4)
        first = await computed(w)
        assert sorted(first) == [0, 70]
        for _ in range(5):
            assert await ask(w) == 64
        assert [after - before for before, after in zip(first, await computed(w), strict=True)] == [
            30 if count else 0 for count in first
        ]
        name = "edgefire_front_cached_tokens_total"
        for kind in ("expected", "found"):
            assert await metric(w, "weur-front", name, kind=kind) == 5 * 64


async def test_a_front_that_starts_anew_and_a_second_one_know_of_caches_at_once(
    tmp_path: Path,
) -> None:
    """Case 21: nothing is kept by fronts, so any of them may be asked."""
    async with world(tmp_path, TWO_PREFILL) as w:
        await ask(w)
        await wait_known(w, 4)
        await restart(w, "weur-front", w.processes["weur-front"].words)
        await wait_served(w)
        await wait_known(w, 4)
        assert await ask(w) == 64
        second = start(w, "second-front", w.processes["weur-front"].words)
        await wait_ready(w, second)
        await wait_known(w, 4, "second-front")
        link: Link[wire.Event] = Link(second.url, w.secret, wire.Event)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.run)
            with anyio.fail_after(PATIENCE_S):
                await link.wait_connected()
            for _ in range(3):  # asked of either, the same worker computes it
                asked = await request_to(w, "weur-prefill", num_prompt=70, max_tokens=5)
                async with link.open(asked) as events:
                    told = [event async for event in events]
                assert isinstance(told[-1], wire.Finish)
                assert await ask(w) == 64
            assert 0 in await computed(w)
            tasks.cancel_scope.cancel()
        await w.settled(*PREFILL, "weur-decode")


@pytest.mark.slow
async def test_a_hint_that_is_wrong_costs_time_and_nothing_else(tmp_path: Path) -> None:
    """Case 21: the worker that had it is killed, comes back with nothing, and is not believed."""
    async with world(tmp_path, TWO_PREFILL) as w:
        await ask(w)
        await wait_known(w, 4)
        [holder] = [name for name in PREFILL if (await w.worker(name)).prompt_tokens_computed]
        w.processes[holder].kill()
        assert await ask(w) == 0
        await restart(w, holder, w.processes[holder].words)
        await wait_served(w)
        await wait_metric(w, "weur-front", "edgefire_front_worker_up", 1, worker=holder)
        assert await ask(w) in {0, 64}
        assert await ask(w) == 64
        await w.settled(*PREFILL, "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_a_hot_prefix_spills_to_others_when_its_worker_is_busy(tmp_path: Path) -> None:
    """Case 20: a burst of prompts that begin alike is not one worker's affair."""
    shape = Shape(roles=TWO_PREFILL.roles, step_s=0.01, worker_flags=("--max-step-tokens", "64"))
    async with world(tmp_path, shape) as w:
        await ask(w)
        await wait_known(w, 4)
        before = await computed(w)
        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(ask, w)
        shares = [now - then for now, then in zip(await computed(w), before, strict=True)]
        assert all(shares)
        assert sum(shares) < 60 * 70 / 3  # most of it was found
        await w.settled(*PREFILL, "weur-decode")
        await nothing_in_flight(w)


async def test_what_the_decode_worker_has_it_need_not_be_handed(tmp_path: Path) -> None:
    """The next turn of a conversation: prompt, answer, and a few words more."""
    shape = Shape(front_flags=("--local-tokens", "16"))
    async with world(tmp_path, shape) as w:
        long = "A" * 70
        assert await ask(w, long) == 0  # split: 70 tokens are more than 16
        name = "edgefire_front_worker_cached_blocks"
        await wait_metric(w, "weur-front", name, 5, worker="weur-decode")
        before = (await w.worker("weur-prefill")).prompt_tokens_computed
        turn = long + counted("A", 20)[:15] + "Z"  # 86 tokens, of which 80 lie in blocks there
        assert await ask(w, turn) == 80
        assert (await w.worker("weur-prefill")).prompt_tokens_computed == before
        placed = "edgefire_front_placements_total"
        assert await metric(w, "weur-front", placed, way="local") == 1
        assert await metric(w, "weur-front", placed, way="split") == 1
