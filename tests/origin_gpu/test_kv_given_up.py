"""Requests given up while an engine is at their file of KV: nothing is left, nothing is mixed."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio

from origin_gpu.handover import Collected, Prefill, Prefilled, Resume
from tests.origin_gpu.local_workers import (
    COUNTING_ENGINE,
    PATIENCE_S,
    LocalWorker,
    ids,
    local_worker,
    prefilled_of,
)

FAULTY_ENGINE = COUNTING_ENGINE.with_name("faulty_engine.py")


@asynccontextmanager
async def gated_pair(
    folder: Path, gated: Literal["p", "d"]
) -> AsyncGenerator[tuple[LocalWorker, LocalWorker, Path], None]:
    """KV goes over TCP; the engine of one of the two waits for a gate where it comes and goes."""
    gate = folder / "gate"
    command = (sys.executable, str(FAULTY_ENGINE), "--gate", str(gate))
    own = {"engine_command": command}
    async with (
        local_worker(folder, "p", "prefill", kv_ways=(), **own if gated == "p" else {}) as p,
        local_worker(folder, "d", "decode", kv_ways=(), **own if gated == "d" else {}) as d,
        p.watching(p.peer, d.peer),
        d.watching(p.peer, d.peer),
    ):
        yield p, d, gate


async def reached(gate: Path) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not gate.with_suffix(".reached").exists():
            await anyio.sleep(0.005)


async def idle(worker: LocalWorker) -> None:
    await worker.until(lambda it: it.in_flight == 0)


async def test_a_file_that_an_engine_still_reads_is_not_written_to(tmp_path: Path) -> None:
    """Else it would take another's KV for that of this prompt, and keep it for the next."""
    async with gated_pair(tmp_path, "d") as (p, d, gate):
        one = p.generate(65, request_id="one", num_prompt=40)
        two = p.generate(90, request_id="two", num_prompt=40)
        async with p.link.open(Prefill(one)) as held:
            first = await prefilled_of(held)
            async with d.link.open(Resume(one, first)):
                await reached(gate)
        await idle(d)  # but its engine has the file open
        async with p.link.open(Prefill(two)) as held:
            events = aiter(held)
            second = await anext(events)
            assert isinstance(second, Prefilled)
            async with d.link.open(Resume(two, second)) as answer:
                assert await anext(events) == Collected()
                gate.touch()
                with anyio.fail_after(PATIENCE_S):
                    assert ids([event async for event in answer]) == [92, 93, 94]
        await d.settled()
        assert ids(await d.ask(one)) == [66, 67, 68, 69]


async def test_a_file_that_an_engine_was_about_to_make_does_not_stay(tmp_path: Path) -> None:
    async with gated_pair(tmp_path, "p") as (p, _, gate):
        async with p.link.open(Prefill(p.generate(65, num_prompt=40))) as held:
            await prefilled_of(held)
            await reached(gate)
        await idle(p)
        gate.touch()
        await p.settled()
        with anyio.fail_after(PATIENCE_S):
            while [it for at in p.app.worker.kv_files._folders for it in at.glob("*.kv")]:
                await anyio.sleep(0.005)
