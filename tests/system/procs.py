"""Worker processes without a front: a test speaks to them over a link, as their front would.

The processes are those of `world`, with engines that count; so are their names, `weur-prefill`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import psutil

from origin_gpu.handover import WorkerEvent
from routing.link import Link
from tests.fakes.model_folder import make_counting_folder
from tests.system.world import Process, Shape, World, start, worker_words

START_S = 120.0  # on a busy machine


@asynccontextmanager
async def worker_processes(home: Path, shape: Shape | None = None) -> AsyncGenerator[World, None]:
    """One ready worker for each of the shape's roles. Leaving the block stops them."""
    shape = shape or Shape()
    secret = home / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a-secret-of-this-test")
    folder = make_counting_folder(home / "model")
    async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
        made = World(home, secret.read_text(), client)
        try:
            for role in shape.roles:
                start(made, f"weur-{role}", worker_words(made, shape, "weur", role, folder))
            for process in made.processes.values():
                await wait_ready(made, process)
            yield made
        finally:
            codes = {process.name: process.stop() for process in made.processes.values()}
        assert {code for code in codes.values() if code >= 0} <= {0}, codes


async def wait_ready(made: World, process: Process) -> None:
    with anyio.fail_after(START_S):
        while not await _ready(made, process):
            assert process.popen.poll() is None, process.log.read_text()[-2000:]
            await anyio.sleep(0.02)


@asynccontextmanager
async def linked(made: World, name: str) -> AsyncGenerator[Link[WorkerEvent], None]:
    """A link to a worker, connected."""
    link: Link[WorkerEvent] = Link(made.processes[name].url, made.secret, WorkerEvent)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        with anyio.fail_after(START_S):
            await link.wait_connected()
        yield link
        tasks.cancel_scope.cancel()


def engines(process: Process) -> list[psutil.Process]:
    """The engine processes of a worker: none while it is between two."""
    children = psutil.Process(process.popen.pid).children()
    return [child for child in children if "counting_engine.py" in " ".join(child.cmdline())]


async def _ready(made: World, process: Process) -> bool:
    try:
        return (await made.client.get(f"{process.url}/ready")).status_code == 200
    except httpx2.TransportError:
        return False
