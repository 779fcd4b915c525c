"""A region that costs next to nothing, for measuring an edge: one process, no engine, no wait.

    python -m loadtest.bench.edge_region FD SECRET MODEL_FOLDER STEP_S TALLY

Every stream gets its first token where it is asked, and one more with each step, all in one frame.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadtest.bench.host_clock import Tally, shared_tally
from loadtest.bench.host_model import CONTEXT_WINDOW, FIRST_WORD, NUM_WORDS
from origin_gpu.models import read_assets
from routing import wire
from routing.link_server import Stream, link_route
from routing.region import ModelReport, RegionReport
from routing.secret import NeedsSecret
from routing.serving import serve_app

MODEL = "@cf/bench/sleeping"
ROOM = 100_000


class Answering:
    """One stream that wants more tokens."""

    def __init__(self, stream: Stream[wire.Generate, wire.Event]) -> None:
        self.ended = anyio.Event()
        self._stream = stream
        self._num_made = 0
        stream.send(wire.Started())
        self.step()

    def step(self) -> None:
        request = self._stream.request
        token = FIRST_WORD + (self._num_made * 7 + len(request.token_ids)) % NUM_WORDS
        self._num_made += 1
        self._stream.send(wire.Tokens((token,)))
        if self._num_made == request.sampling.max_tokens:
            used = wire.Usage(
                prompt_tokens=len(request.token_ids), completion_tokens=self._num_made
            )
            self._stream.send(wire.Finish("length", used))
            self.ended.set()


class SleepingRegion:
    def __init__(self, secret: str, assets: wire.TextAssets, step_s: float, tally: Tally) -> None:
        self._secret = secret
        self._assets = assets
        self._step_s = step_s
        self._tally = tally
        self._answering: set[Answering] = set()
        self._num_tokens = 0

    @property
    def app(self) -> Starlette:
        guarded = [Middleware(NeedsSecret, secret=self._secret)]
        return Starlette(
            routes=[
                link_route(self._answer, requests=wire.Generate, secret=self._secret),
                Route("/v1/report", self._report, middleware=guarded),
                Route("/v1/assets/{digest}", self._give_assets, middleware=guarded),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._step)
            yield
            tasks.cancel_scope.cancel()

    async def _step(self) -> None:
        at = time.monotonic()
        while True:
            now = time.monotonic()
            at = max(at + self._step_s, now)
            await anyio.sleep(at - now)
            for answering in list(self._answering):
                if not answering.ended.is_set():
                    answering.step()
                    self._num_tokens += 1
            self._tally.tell(os.getpid(), 0, self._num_tokens)

    async def _answer(self, stream: Stream[wire.Generate, wire.Event]) -> None:
        answering = Answering(stream)
        self._num_tokens += 1
        self._answering.add(answering)
        try:
            await answering.ended.wait()
        finally:
            self._answering.discard(answering)

    async def _report(self, request: Request) -> Response:
        model = ModelReport(
            model=MODEL,
            model_digest="none",
            tokenizer_digest=self._assets.digest,
            context_window=CONTEXT_WINDOW,
            max_sequence_tokens=CONTEXT_WINDOW,
        )
        report = RegionReport(region="here", epoch="1", room=ROOM, models=(model,), processes=())
        return Response(msgspec.json.encode(report), media_type="application/json")

    async def _give_assets(self, request: Request) -> Response:
        return Response(msgspec.msgpack.encode(self._assets))


def main() -> None:
    fd, secret, folder, step_s, tally = sys.argv[1:]
    gc.freeze()
    with shared_tally(Path(tally)) as told:
        region = SleepingRegion(secret, read_assets(Path(folder)), float(step_s), told)
        serve_app(region.app, host="127.0.0.1", port=0, fd=int(fd))


if __name__ == "__main__":
    main()
