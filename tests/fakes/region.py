"""Workers without an engine: the next token is the last one plus one. And a region made of them.

They speak the link as real workers do. What they do at a stage can be changed from outside: wait at
a gate, fail, or both.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio
import httpx2
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infire.kv_layout import KVGroup, KVLayout
from origin_gpu.front import create_app
from origin_gpu.handover import (
    CacheNews,
    Collected,
    KVTicket,
    Peer,
    Prefill,
    Prefilled,
    Resume,
    Watch,
    Watched,
    WorkerEvent,
    WorkerRequest,
)
from origin_gpu.settings import FrontSettings, WorkerAt, WorkerRole
from routing import wire
from routing.errors import Failure
from routing.link import Link
from routing.link_flow import Wake
from routing.link_frames import Pace
from routing.link_server import Stream, link_route
from routing.region import ModelReport, ProcessReport
from routing.secret import bearer
from routing.serving import address, listening_socket
from tests.fakes.serving import Serving

SECRET = "fleet-secret"
BRISK = Pace(beat_s=0.2, silence_s=4.0, stall_s=4.0)
MODEL = "@cf/test/counter"
LAYOUT = KVLayout(
    groups=(KVGroup(kind="full", layers=(0,), num_heads=1, head_dim=1),),
    dtype="bfloat16",
    model_digest="m",
)
ASSETS = wire.TextAssets(tokenizer_json=b"{}", chat_template="", stop_ids=(0,))

BLOCK_TOKENS = 4
Stage = Literal["prefill", "held", "collect", "token", "finish", "embed"]


async def no_gate(request: wire.Request) -> None:
    await anyio.lowlevel.checkpoint()


@dataclass(eq=False)
class FakeWorker:
    name: str
    role: WorkerRole
    url: str = ""
    max_waiting: int = 100
    waiting: int = 0
    ready: bool = True
    kv_address: str = ""
    tokenizer_digest: str = ASSETS.digest
    layout_digest: str = "layout"
    news: list[CacheNews] = field(default_factory=list)  # not told yet
    asked: list[WorkerRequest] = field(default_factory=list)
    open: Counter[str] = field(default_factory=Counter)  # streams being answered, by kind
    peers: tuple[Peer, ...] = ()
    gates: dict[Stage, Callable[[Any], Awaitable[None]]] = field(default_factory=dict)
    held: dict[str, anyio.Event] = field(default_factory=dict)  # shared by a region's workers
    fetched: int = 0  # times its assets were asked for

    def __post_init__(self) -> None:
        self.kv_address = self.kv_address or f"{self.name}:1"
        self._said = Wake()

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                link_route(self._answer, requests=WorkerRequest, secret=SECRET, pace=BRISK),
                Route("/v1/assets/{digest}", self._assets),
            ]
        )

    @property
    def num_open(self) -> int:
        """Streams being answered, the front's watch apart."""
        return self.open.total() - self.open["Watch"]

    def of(self, kind: type[Any]) -> list[Any]:
        """The requests of this kind that came, in order."""
        return [request for request in self.asked if isinstance(request, kind)]

    def tell(self, news: CacheNews) -> None:
        """Say what came into the prefix cache, and what went."""
        self.news.append(news)
        self.say()

    def say(self) -> None:
        """Report now."""
        self._said.set()

    async def _assets(self, request: Request) -> Response:
        self.fetched += 1
        return Response(msgspec.msgpack.encode(ASSETS))

    async def _answer(self, stream: Stream[WorkerRequest, WorkerEvent]) -> None:
        kind = type(stream.request).__name__
        self.asked.append(stream.request)
        self.open[kind] += 1
        try:
            match stream.request:
                case Watch():
                    await self._watch(stream, stream.request)
                case Prefill(request):
                    await self._prefill(stream, request)
                case Resume(request, prefilled):
                    await self._collect(prefilled)
                    await self._count(
                        stream, request, [*request.generated_ids, *prefilled.first.ids]
                    )
                case wire.Generate() as request:
                    stream.send(wire.Started(0))
                    await self._count(stream, request, list(request.generated_ids))
                case wire.Embed() as request:
                    await self._gate("embed", request)
                    stream.send(embedded(request))
        finally:
            self.open[kind] -= 1

    async def _gate(self, stage: Stage, request: wire.Request) -> None:
        await self.gates.get(stage, no_gate)(request)

    async def _watch(self, stream: Stream[Any, WorkerEvent], watch: Watch) -> None:
        self.peers = watch.peers
        while True:
            stream.send(
                Watched(
                    report=self._report(),
                    kv_address=self.kv_address,
                    layout_digest=self.layout_digest,
                    block_tokens=BLOCK_TOKENS,
                )
            )
            while self.news:
                stream.send(self.news.pop(0))
            await self._said.wait()

    def _report(self) -> ProcessReport:
        model = ModelReport(
            model=MODEL,
            model_digest="m",
            tokenizer_digest=self.tokenizer_digest,
            context_window=100,
            max_sequence_tokens=100,
        )
        return ProcessReport(
            name=self.name,
            region="here",
            role=self.role,
            pid=1,
            url=self.url,
            epoch="e",
            ready=self.ready,
            in_flight=self.num_open,
            waiting=self.waiting,
            max_waiting=self.max_waiting,
            models=(model,),
        )

    async def _prefill(self, stream: Stream[Any, WorkerEvent], request: wire.Generate) -> None:
        await self._gate("prefill", request)
        generated = list(request.generated_ids)
        first = next_id(request, generated)
        finish = finish_of(request, [*generated, first])
        ticket = KVTicket(
            worker=self.name,
            url=self.url,
            request_id=request.request_id,
            epoch="e",
            num_tokens=len(request.token_ids),
            num_bytes=0,
            layout=LAYOUT,
            lease_s=1.0,
        )
        collected = self.held[request.request_id] = anyio.Event()
        stream.send(
            Prefilled(
                first=wire.Tokens((first,)),
                cached_tokens=2,
                finish=finish,
                ticket=None if finish else ticket,
            )
        )
        if finish is None:
            await self._gate("held", request)
            await collected.wait()
            stream.send(Collected())

    async def _collect(self, prefilled: Prefilled) -> None:
        assert prefilled.ticket is not None
        await self.gates.get("collect", no_gate)(prefilled.ticket)  # type: ignore[arg-type]
        self.held.pop(prefilled.ticket.request_id).set()

    async def _count(
        self, stream: Stream[Any, WorkerEvent], request: wire.Generate, output: list[int]
    ) -> None:
        while (finish := finish_of(request, output)) is None:
            await self._gate("token", request)
            output.append(next_id(request, output))
            stream.send(wire.Tokens((output[-1],)))
        await self._gate("finish", request)
        stream.send(finish)


def embedded(request: wire.Embed) -> wire.Embedded:
    """Each text's vector is its number of ids."""
    numbers = [float(len(ids)) for ids in request.texts]
    return wire.Embedded(
        vectors=struct.pack(f"<{len(numbers)}f", *numbers),
        width=1,
        pooling=request.pooling or "mean",
        prompt_tokens=request.num_prompt,
    )


def next_id(request: wire.Generate, output: list[int]) -> int:
    return (output or request.token_ids)[-1] + 1


def finish_of(request: wire.Generate, output: list[int]) -> wire.Finish | None:
    usage = wire.Usage(prompt_tokens=len(request.token_ids), completion_tokens=len(output))
    if output and output[-1] in request.sampling.stop_ids:
        return wire.Finish("stop", usage)
    return wire.Finish("length", usage) if len(output) >= request.sampling.max_tokens else None


def failing(failure: Failure, *, times: int = 10**6) -> Callable[[Any], Awaitable[None]]:
    """A gate at which the first `times` requests fail."""
    left = [failure] * times

    async def gate(request: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if left:
            raise left.pop()

    return gate


class Latch:
    """A gate that is closed until it is opened, and knows whether somebody waits at it."""

    def __init__(self) -> None:
        self._opened = anyio.Event()
        self._reached = anyio.Event()

    async def __call__(self, request: Any) -> None:
        self._reached.set()
        await self._opened.wait()

    def open(self) -> None:
        self._opened.set()

    async def wait_reached(self) -> None:
        with anyio.fail_after(10):
            await self._reached.wait()


@dataclass
class FakeRegion:
    """A front on a real socket with fake workers, and a link to it as an edge has one."""

    url: str
    workers: dict[str, FakeWorker]
    edge: Link[wire.Event]
    servers: dict[str, Serving]

    async def kill(self, name: str) -> None:
        """Stop a worker's server: its connections are lost."""
        await self.servers[name].stop()

    def __getitem__(self, name: str) -> FakeWorker:
        return self.workers[name]

    async def wait_known(self, name: str, num_blocks: int) -> None:
        """Until the front knows of so many blocks in that worker's cache."""
        line = f'edgefire_front_worker_cached_blocks{{worker="{name}"}} {float(num_blocks)}'
        async with httpx2.AsyncClient(headers=bearer(SECRET), trust_env=False) as client:
            with anyio.fail_after(10):
                while line not in (await client.get(f"{self.url}/metrics")).text.splitlines():
                    await anyio.sleep(0.005)

    async def wait_idle(self) -> None:
        """Until no worker answers anything, and the front has nothing in flight."""
        async with httpx2.AsyncClient(headers=bearer(SECRET), trust_env=False) as client:
            with anyio.fail_after(10):
                while True:
                    metrics = (await client.get(f"{self.url}/metrics")).text
                    busy = re.findall(
                        r"^edgefire_front_(?:in_flight|worker_tokens\S*) (\S+)$", metrics, re.M
                    )
                    if not any(map(float, busy)) and not any(
                        w.num_open for w in self.workers.values()
                    ):
                        return
                    await anyio.sleep(0.01)


@asynccontextmanager
async def fake_region(
    *workers: FakeWorker, journal: Path | None = None
) -> AsyncGenerator[FakeRegion, None]:
    """The region made of `workers`, once its front knows them all."""
    held: dict[str, anyio.Event] = {}
    servers = {}
    async with anyio.create_task_group() as tasks:
        for worker in workers:
            worker.held = held
            servers[worker.name] = running = Serving(worker.app)
            worker.url = running.url
            await running.start(tasks)
        settings = FrontSettings(
            name="here-front",
            region="here",
            workers=tuple(WorkerAt(name=w.name, role=w.role, url=w.url) for w in workers),
            secret_file=Path("read-by-run-only"),
            local_tokens=0,
            journal=journal,
        )
        listener = listening_socket("127.0.0.1", 0)
        front = Serving(create_app(settings, SECRET, address(listener), pace=BRISK), listener)
        await front.start(tasks)
        edge: Link[wire.Event] = Link(front.url, SECRET, wire.Event, pace=BRISK)
        tasks.start_soon(edge.run)
        with anyio.fail_after(10):
            await edge.wait_connected()
            while any(len(worker.peers) < len(workers) for worker in workers):
                await anyio.sleep(0.005)
        yield FakeRegion(front.url, {worker.name: worker for worker in workers}, edge, servers)
        async with anyio.create_task_group() as stopping:
            for running in (front, *servers.values()):
                stopping.start_soon(running.stop)
        tasks.cancel_scope.cancel()
