"""Workers in the test's own process, on real sockets, each with a real engine process that counts.

The test is their front: it holds the links, and tells them of their peers.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
from prometheus_client import CollectorRegistry

from origin_gpu.handover import (
    Collected,
    Peer,
    Prefilled,
    Watch,
    Watched,
    WorkerEvent,
    WorkerRequest,
)
from origin_gpu.settings import WorkerRole, WorkerSettings
from origin_gpu.worker_app import WorkerApp, create_app, worker_app
from routing import wire
from routing.errors import Code
from routing.link import Link
from routing.link_frames import Pace
from routing.region import ProcessReport
from routing.secret import bearer
from routing.serving import address, listening_socket
from tests.fakes.model_folder import make_counting_folder
from tests.fakes.serving import serving

SECRET = "fleet-secret"
MODEL = "@cf/test/counting"
BRISK = Pace(beat_s=0.2, silence_s=8.0, stall_s=8.0)
COUNTING_ENGINE = Path(__file__).parents[1] / "fakes" / "counting_engine.py"
PATIENCE_S = 60.0  # on a busy machine


@dataclass
class LocalWorker:
    name: str
    role: WorkerRole
    url: str
    app: WorkerApp
    link: Link[WorkerEvent]
    client: httpx2.AsyncClient

    @property
    def report(self) -> ProcessReport:
        return self.app.worker.report()

    @property
    def peer(self) -> Peer:
        return Peer(
            name=self.name,
            role=self.role,
            url=self.url,
            kv_address=self.app.worker.door.address,
        )

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (found,) = [
            child
            for child in psutil.Process().children()
            if f"--device {self.name}" in " ".join(child.cmdline())
        ]
        return found

    def generate(self, last: int = 65, **other: Any) -> wire.Generate:
        """A prompt of `num_prompt` (2) ids `last`, which goes on last + 1, last + 2, ..."""
        sampling = {"max_tokens": other.pop("max_tokens", 4), "seed": 1}
        sampling |= other.pop("sampling", {})
        fields = {
            "request_id": "r1",
            "tenant_salt": b"",
            "model": MODEL,
            "tokenizer_digest": self.app.worker.assets_digest,
            "token_ids": (last,) * other.pop("num_prompt", 2),
            "sampling": wire.Sampling(**sampling),
            "budget_s": PATIENCE_S,
        }
        return wire.Generate(**(fields | other))

    async def ask(self, request: WorkerRequest) -> list[WorkerEvent]:
        """All that is answered."""
        with anyio.fail_after(PATIENCE_S):
            async with self.link.open(request) as events:
                return [event async for event in events]

    async def until(self, holds: Callable[[ProcessReport], bool]) -> ProcessReport:
        """The first report of which it is so."""
        with anyio.fail_after(PATIENCE_S):
            while not holds(report := self.report):
                await anyio.sleep(0.002)
        return report

    async def settled(self) -> ProcessReport:
        """Its report once it has nothing to do, and every block is free."""
        return await self.until(
            lambda it: (
                it.ready
                and it.free_blocks == it.total_blocks
                and (it.total_blocks > 0 or it.models[0].task == "text-embeddings")
                and it.in_flight == it.waiting == it.held == 0
            )
        )

    @asynccontextmanager
    async def watching(self, *peers: Peer) -> AsyncGenerator[None, None]:
        """It has been told of `peers`."""
        async with self.link.open(Watch(peers)) as events:
            assert isinstance(await anext(aiter(events)), Watched)
            yield


@asynccontextmanager
async def local_worker(
    home: Path, name: str = "w", role: WorkerRole = "both", *, step_s: float = 0.0, **other: Any
) -> AsyncGenerator[LocalWorker, None]:
    """A ready worker. When the block is left, nothing may be left of any request."""
    listener = listening_socket("127.0.0.1", 0)
    registry = CollectorRegistry()
    fields = {
        "name": name,
        "region": "here",
        "role": role,
        "model": MODEL,
        "device": name,  # which the counting engine ignores: its processes are told apart by it
        "model_dir": make_counting_folder(home / "model"),
        "secret_file": home / "read-by-run-only",
        "engine_command": (sys.executable, str(COUNTING_ENGINE), "--step-s", str(step_s)),
    }
    settings = WorkerSettings(**(fields | other))
    async with AsyncExitStack() as stack:
        app = stack.enter_context(worker_app(settings, SECRET, address(listener), registry))
        served = create_app(app, registry, pace=BRISK)
        url = await stack.enter_async_context(serving(served, listener))
        client = httpx2.AsyncClient(
            base_url=url, headers=bearer(SECRET), timeout=PATIENCE_S, trust_env=False
        )
        await stack.enter_async_context(client)
        link: Link[WorkerEvent] = Link(url, SECRET, WorkerEvent, pace=BRISK)
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(link.run)
        worker = LocalWorker(name, role, url, app, link, client)
        await worker.settled()
        with anyio.fail_after(PATIENCE_S):
            await link.wait_connected()
        yield worker
        await worker.settled()
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def local_pair(
    home: Path, *, step_s: float = 0.0, **other: Any
) -> AsyncGenerator[tuple[LocalWorker, LocalWorker], None]:
    """A prefill and a decode worker that know each other."""
    async with (
        local_worker(home, "p", "prefill", step_s=step_s, **other) as prefill,
        local_worker(home, "d", "decode", step_s=step_s, **other) as decode,
        prefill.watching(prefill.peer, decode.peer),
        decode.watching(prefill.peer, decode.peer),
    ):
        yield prefill, decode


def ids(events: list[WorkerEvent]) -> list[int]:
    return [it for event in events if isinstance(event, wire.Tokens) for it in event.ids]


def fault(events: list[WorkerEvent], code: Code) -> str:
    """The detail of the only terminal event, which must be a fault of this code."""
    terminal = [it for it in events if isinstance(it, wire.Finish | wire.Fault | Collected)]
    assert len(terminal) == 1
    assert isinstance(events[-1], wire.Fault)
    assert events[-1].code is code, events[-1]
    return events[-1].detail


async def prefilled_of(events: Any) -> Prefilled:
    with anyio.fail_after(PATIENCE_S):
        first = await anext(aiter(events))
    assert isinstance(first, Prefilled), first
    return first


async def watched(said: AsyncIterator[WorkerEvent]) -> Watched:
    """How the worker is, as it says next."""
    while not isinstance(told := await anext(said), Watched):
        pass
    return told
