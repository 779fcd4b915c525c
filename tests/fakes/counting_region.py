"""A whole region in one small server, as an edge sees it: front, model and all.

Its model counts as `runner.py`'s does, on the byte-level tokenizer of `model_folder.py`: the raw
prompt "AB" is continued by "CDE...". What it does before each token can be changed from outside.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from routing import wire
from routing.errors import Failure
from routing.link_frames import Pace
from routing.link_server import Stream, link_route
from routing.region import ModelReport, Place, Region, RegionReport, Task
from routing.secret import NeedsSecret
from routing.serving import listening_socket
from tests.fakes.counting_encoder import WIDTH, vector
from tests.fakes.model_folder import CHAT_TEMPLATE, END_ID, counting_tokenizer
from tests.fakes.serving import Serving

SECRET = "fleet-secret"
MODEL = "@cf/test/counting"
ASSETS = wire.TextAssets(
    tokenizer_json=counting_tokenizer().to_str().encode(),
    chat_template=CHAT_TEMPLATE,
    stop_ids=(END_ID,),
)
# The same text in other bytes, so another digest.
OTHER_ASSETS = msgspec.structs.replace(ASSETS, special_tokens={"pad_token": "<|endoftext|>"})

Gate = Callable[[wire.Generate, int], Awaitable[None]]


async def no_gate(request: wire.Generate, index: int) -> None:
    await anyio.lowlevel.checkpoint()


async def no_embed_gate(request: wire.Embed) -> None:
    await anyio.lowlevel.checkpoint()


@dataclass(eq=False)
class CountingRegion:
    name: str = "weur"
    model: str = MODEL
    place: Place = field(default_factory=lambda: Place(52.37, 4.90))
    room: int = 8
    serves: bool = True  # its model; else none, as while its engines start again
    window: int = 8192
    model_digest: str = "m"
    assets: wire.TextAssets = ASSETS  # what it has
    reported: wire.TextAssets | None = None  # what it says it has, if that is something else
    epoch: str = "1"
    cached_tokens: int = 0
    burst: int = 1  # tokens an event
    says_started: bool = True
    # Before a token: index 0 is the first of the answer. What it raises is told to the edge.
    gate: Gate = no_gate
    started_gate: Gate = no_gate  # before `Started`: the queue
    task: Task = "text-generation"
    embed_gate: Callable[[wire.Embed], Awaitable[None]] = no_embed_gate  # before vectors
    asked: list[wire.Generate] = field(default_factory=list)
    embeds: list[wire.Embed] = field(default_factory=list)
    num_open: int = 0
    fetched: int = 0  # times its assets were asked for

    def __post_init__(self) -> None:
        self._listener = listening_socket("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._server: Serving | None = None

    @property
    def region(self) -> Region:
        return Region(name=self.name, url=f"http://127.0.0.1:{self.port}", place=self.place)

    async def start(self, tasks: TaskGroup) -> None:
        """Answer; after a `stop`, on the same port."""
        if self._server is not None:
            self._listener = listening_socket("127.0.0.1", self.port)
        self._server = Serving(self.app, self._listener)
        await self._server.start(tasks)

    async def stop(self) -> None:
        """Cut all connections and answer nobody any more, until the next `start`."""
        if self._server is not None:
            await self._server.stop()

    @property
    def app(self) -> Starlette:
        guarded = [Middleware(NeedsSecret, secret=SECRET)]
        pace = Pace(beat_s=0.2, silence_s=4.0, stall_s=60.0)
        return Starlette(
            routes=[
                link_route(self._answer, requests=wire.Request, secret=SECRET, pace=pace),
                Route("/v1/report", self._report, middleware=guarded),
                Route("/v1/assets/{digest}", self._assets, middleware=guarded),
            ]
        )

    async def wait_idle(self) -> None:
        with anyio.fail_after(10):
            while self.num_open:
                await anyio.sleep(0.005)

    async def wait_asked(self, times: int = 1) -> None:
        with anyio.fail_after(10):
            while len(self.asked) < times:
                await anyio.sleep(0.005)

    async def _report(self, request: Request) -> Response:
        model = ModelReport(
            model=self.model,
            model_digest=self.model_digest,
            tokenizer_digest=(self.reported or self.assets).digest,
            context_window=self.window,
            max_sequence_tokens=self.window,
            task=self.task,
        )
        report = RegionReport(
            region=self.name,
            epoch=self.epoch,
            room=self.room,
            models=(model,) if self.serves else (),
            processes=(),
        )
        return Response(msgspec.json.encode(report), media_type="application/json")

    async def _assets(self, request: Request) -> Response:
        self.fetched += 1
        if request.path_params["digest"] != self.assets.digest:
            return Response(status_code=404)
        return Response(msgspec.msgpack.encode(self.assets))

    async def _answer(self, stream: Stream[wire.Request, wire.Event]) -> None:
        request = stream.request
        self.num_open += 1
        try:
            if isinstance(request, wire.Embed):
                self.embeds.append(request)
                await self.embed_gate(request)
                stream.send(embedded(request))
            else:
                self.asked.append(request)
                await self._count(stream, request)
        finally:
            self.num_open -= 1

    async def _count(self, stream: Stream[Any, wire.Event], request: wire.Generate) -> None:
        await self.started_gate(request, len(request.generated_ids))
        if self.says_started:
            stream.send(wire.Started(self.cached_tokens))
        last = (request.token_ids + request.generated_ids)[-1]
        count = len(request.generated_ids)
        while (finish := _finish(request, count, last)) is None:
            await self.gate(request, count)
            ids: list[int] = []
            while len(ids) < self.burst and _finish(request, count, last) is None:
                last, count = (last + 1) % 256, count + 1
                ids.append(last)
            stream.send(wire.Tokens(tuple(ids), _logprobs(request, ids)))
        stream.send(finish)


def embedded(request: wire.Embed) -> wire.Embedded:
    """As `counting_encoder` has it: sum of ids, number of ids, 1 by the mean or 2 by the first."""
    pooling = request.pooling or "mean"
    return wire.Embedded(
        vectors=b"".join(vector(ids, pooling) for ids in request.texts),
        width=WIDTH,
        pooling=pooling,
        prompt_tokens=request.num_prompt,
    )


def _finish(request: wire.Generate, count: int, last: int) -> wire.Finish | None:
    usage = wire.Usage(prompt_tokens=len(request.token_ids), completion_tokens=count)
    if count and last in request.sampling.stop_ids:
        return wire.Finish("stop", usage)
    return wire.Finish("length", usage) if count >= request.sampling.max_tokens else None


def _logprobs(request: wire.Generate, ids: list[int]) -> tuple[wire.Logprob, ...]:
    """As the counting runner: the chosen id 0.0, the i-th likeliest is i further on, -i."""
    if (most := request.sampling.logprobs) is None:
        return ()
    return tuple(
        wire.Logprob(one, 0.0, tuple(((one + i) % 256, -float(i)) for i in range(most)))
        for one in ids
    )


def refusing(failure: Failure, *, times: int = 10**6, at: int = 0) -> Gate:
    """A gate at which the first `times` requests to reach token `at` fail."""
    left = [failure] * times

    async def gate(request: wire.Generate, index: int) -> None:
        await anyio.lowlevel.checkpoint()
        if index >= at and left:
            raise left.pop()

    return gate


class Steps:
    """A gate that lets as many tokens through as it was told to."""

    def __init__(self, allowed: int = 0) -> None:
        self._allowed = allowed
        self._moved = anyio.Event()
        self.waiting_at: int | None = None

    async def __call__(self, request: wire.Generate, index: int) -> None:
        while index >= self._allowed:
            self.waiting_at = index
            await self._moved.wait()

    def allow(self, upto: int) -> None:
        """Let tokens of an index below `upto` through."""
        self._allowed = upto
        self._moved.set()
        self._moved = anyio.Event()


@asynccontextmanager
async def running(*regions: CountingRegion) -> AsyncGenerator[TaskGroup, None]:
    """All of them, up. More may be started in the task group; all end with the block."""
    async with anyio.create_task_group() as tasks:
        for region in regions:
            await region.start(tasks)
        yield tasks
        for region in regions:
            await region.stop()
