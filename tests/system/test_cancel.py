"""Hanging up is cancel, at every phase: real sockets closed, real block counts read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from routing.region import ProcessReport
from tests.fakes.events import frames, read_all
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
CHUNK = 32


@asynccontextmanager
async def asking(w: World, prompt: str, max_tokens: int, *, stream: bool) -> AsyncIterator[None]:
    """A request under way; leaving the block closes its connection."""

    async def ask() -> None:
        if stream:
            async with w.stream(prompt, max_tokens) as response:
                await response.aread()
        else:
            await w.raw(prompt, max_tokens)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        yield
        tasks.cancel_scope.cancel()


async def until(read: Callable[[], Awaitable[ProcessReport]], seen: str) -> ProcessReport:
    """The first report in which the named count is not zero."""
    with anyio.fail_after(20):
        while not getattr(report := await read(), seen):
            await anyio.sleep(0.005)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_in_a_prefill_of_eight_chunks(tmp_path: Path, stream: bool) -> None:
    """It costs at most the chunk that was under way."""
    shape = Shape(step_s=1.0, worker_flags=("--max-step-tokens", str(CHUNK)))
    async with world(tmp_path, shape) as w:
        async with asking(w, "A" * 8 * CHUNK, 4, stream=stream):
            seen = await until(lambda: w.worker("weur-prefill"), "prompt_tokens_computed")
        await w.settled("weur-prefill", "weur-decode")
        after = await w.worker("weur-prefill")
        assert after.prompt_tokens_computed <= seen.prompt_tokens_computed + CHUNK
        assert after.prompt_tokens_computed < 8 * CHUNK


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_in_decode(tmp_path: Path, stream: bool) -> None:
    async with world(tmp_path, Shape(step_s=0.05)) as w:
        async with asking(w, "!", 90, stream=stream):
            await until(lambda: w.worker("weur-decode"), "in_flight")
        await w.settled("weur-prefill", "weur-decode")


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_in_the_queue(tmp_path: Path, stream: bool) -> None:
    """The one ahead is not disturbed."""
    shape = Shape(step_s=0.05, roles=("both",), worker_flags=("--max-running", "1"))
    async with world(tmp_path, shape) as w, w.stream("!", 40) as ahead:
        texts = frames(ahead)
        got = (await anext(texts))["response"]
        async with asking(w, "A", 4, stream=stream):
            await until(lambda: w.worker("weur-both"), "waiting")
        with anyio.fail_after(20):
            while (await w.worker("weur-both")).in_flight > 1:
                await anyio.sleep(0.01)
        async for frame in texts:
            if isinstance(frame, dict):
                got += frame["response"]
        assert got == counted("!", 40)
        await w.settled("weur-both")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_in_the_transfer(tmp_path: Path, stream: bool) -> None:
    """The decode worker hangs, so KV is held on the prefill worker: hanging up frees it."""
    async with world(tmp_path, Shape(worker_flags=("--lease-s", "600"))) as w:
        assert (await w.raw("A", 2)).status_code == 200
        w.processes["weur-decode"].pause()
        async with asking(w, "A" * 100, 8, stream=stream):
            await until(lambda: w.worker("weur-prefill"), "held")
        await w.settled("weur-prefill")
        w.processes["weur-decode"].go_on()
        await w.settled("weur-decode")
        async with w.stream("A", 3) as response:
            assert (await read_all(response))[0] == "BCD"


@pytest.mark.slow
async def test_many_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(step_s=0.01, worker_flags=("--kv-tokens", "65536"))) as w:

        async def leave_after(num_frames: int) -> None:
            async with w.stream("!", 90) as response:
                async for _ in frames(response):
                    num_frames -= 1
                    if num_frames < 0:
                        return

        async with anyio.create_task_group() as tasks:
            for n in range(60):
                tasks.start_soon(leave_after, n % 10)
        await w.settled("weur-prefill", "weur-decode")
        assert (await w.region("weur")).room > 0
