"""The door of a region: requests come in over links from edges, and go to workers over links.

Knows token ids and no text, and of a worker only what it says of itself.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import monotonic
from typing import cast

import anyio
import httpx2
from anyio import to_thread
from msgspec import json
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from origin_gpu.assets import Assets
from origin_gpu.embed_passage import EmbedPassage
from origin_gpu.journal import Journal, open_journal
from origin_gpu.metrics import FrontMetrics, PoolCollector
from origin_gpu.passage import Passage
from origin_gpu.pool import NameTaken, Pool
from origin_gpu.report import region_report, room, served_models, serving
from origin_gpu.settings import FrontSettings, parse_workers
from origin_gpu.waits import Line, Turn
from routing import wire
from routing.drain import Drain
from routing.errors import Code, Failure
from routing.link_frames import LinkStats, Pace
from routing.link_server import Stream, link_route
from routing.logs import log
from routing.region import ProcessReport, RegionReport
from routing.rows import CANNOT
from routing.secret import NeedsSecret, bearer, read_secret
from routing.serving import address, listening_socket, serve_app

logger = logging.getLogger(__name__)

FETCH_S = 10.0  # for a model's text assets: some MB from a worker next door


class Front:
    """One front process: its pool, its requests, and what it says of them."""

    def __init__(
        self,
        settings: FrontSettings,
        url: str,
        pool: Pool,
        metrics: FrontMetrics,
        journal: Journal | None,
        drain: Drain,
    ) -> None:
        self._settings = settings
        self._url = url
        self._pool = pool
        self._metrics = metrics
        self._journal = journal
        self._drain = drain
        self._epoch = uuid.uuid4().hex
        self._in_flight = 0
        self._seen_models: set[str] = set()  # bounds the metrics' labels
        self._lines: dict[str, Line] = {}  # by model

    async def serve(self, stream: Stream[wire.Request, wire.Event]) -> None:
        """Answer one request, and say how it went. Raises Failure."""
        self._drain.check()
        turn: Turn | None = None

        def on_first() -> None:
            if turn is not None:
                turn.start(monotonic())

        passage = self._passage(stream, on_first)
        outcome: str = Code.INTERNAL
        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            turn = self._enter(stream.request)
            await passage.carry()
            outcome = passage.reason or outcome
        except Failure as failure:
            outcome = failure.code
            raise
        except anyio.get_cancelled_exc_class():
            outcome = Code.ABORTED
            raise
        finally:
            if turn is not None:
                turn.leave()
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._record(passage, outcome)
            if self._journal is not None:
                self._journal.note(passage, outcome)

    def _passage(
        self, stream: Stream[wire.Request, wire.Event], on_first: Callable[[], None]
    ) -> Passage | EmbedPassage:
        if isinstance(stream.request, wire.Embed):
            return EmbedPassage(self._pool, cast("Stream[wire.Embed, wire.Event]", stream))
        return Passage(
            self._pool,
            cast("Stream[wire.Generate, wire.Event]", stream),
            local_tokens=self._settings.local_tokens,
            on_first=on_first,
        )

    def _enter(self, request: wire.Request) -> Turn | None:
        """A place among those who wait for the request's model, where workers serve it. Failure
        where that would be for too long. Texts to embed are counted by their workers."""
        if isinstance(request, wire.Embed):
            return None
        model, ready = request.model, self._pool.candidates()
        if model not in self._lines:
            if all(it.model != model for it in served_models(ready)):
                return None
            self._lines[model] = Line(self._settings.max_wait_s)
        return self._lines[model].enter(
            request.priority,
            monotonic(),
            idle=room(serving(ready, model), "idle") > 0,
            begun=bool(request.generated_ids),
        )

    def report(self) -> RegionReport:
        """What the region would say of itself now."""
        ready = [] if self._drain.begun else self._pool.candidates()
        front = ProcessReport(
            name=self._settings.name,
            region=self._settings.region,
            role="front",
            pid=os.getpid(),
            url=self._url,
            epoch=self._epoch,
            ready=bool(served_models(ready)),
            in_flight=self._in_flight,
        )
        now = monotonic()
        rooms = {
            model: line.room(now, idle=room(serving(ready, model), "idle") > 0)
            for model, line in self._lines.items()
        }
        most = {model: count for model, count in rooms.items() if count is not None}
        return region_report(front, self._pool.reports(), ready, most=most)

    @property
    def unready(self) -> str | None:
        """Why it would serve nothing now; None where it would."""
        if self._drain.begun:
            return "it is being stopped"
        return None if self.report().models else "no way to serve any model"

    def _record(self, passage: Passage | EmbedPassage, outcome: str) -> None:
        request = passage.request
        self._seen_models |= {it.model for it in served_models(self._pool.candidates())}
        model = request.model if request.model in self._seen_models else "unknown"
        self._metrics.requests.labels(model, outcome).inc()
        self._metrics.tokens.labels(model, "prompt").inc(request.num_prompt)
        if passage.second_try is not None:
            self._metrics.second_tries.labels(passage.second_try.code).inc()
        if isinstance(passage, Passage):
            self._count(passage, model)
        log(
            logger,
            "request",
            request_id=request.request_id,
            model=request.model,
            **passage.told,
            prompt_tokens=request.num_prompt,
            total_ms=round(1000 * passage.elapsed_s, 1),
            outcome=outcome,
        )

    def _count(self, passage: Passage, model: str) -> None:
        """What only an answer in tokens has."""
        self._metrics.tokens.labels(model, "output").inc(passage.num_new)
        if passage.ttft_s is not None:
            self._metrics.ttft_s.labels(model).observe(passage.ttft_s)
            if passage.reason is not None and (line := self._lines.get(passage.request.model)):
                line.answered(passage.elapsed_s - passage.ttft_s)
        if passage.way is not None:
            self._metrics.placements.labels(passage.way).inc()
        expected = self._metrics.cached_tokens.labels("expected")
        expected.inc(passage.expected_cached_tokens)
        self._metrics.cached_tokens.labels("found").inc(passage.cached_tokens)


def create_app(
    settings: FrontSettings,
    secret: str,
    url: str,
    *,
    registry: CollectorRegistry | None = None,
    pace: Pace | None = None,
    drain: Drain | None = None,
) -> Starlette:
    """The front as an ASGI app that is reached at `url`."""
    edges, drain = LinkStats(), drain or Drain(settings.grace_s)
    drain.num_left = lambda: edges.num_open
    pool = Pool(settings.workers, secret, pace)
    metrics = FrontMetrics(registry or CollectorRegistry())
    metrics.registry.register(PoolCollector(pool, edges))
    journal = open_journal(settings.journal, settings, unix_time) if settings.journal else None
    front = Front(settings, url, pool, metrics, journal, drain)
    client = httpx2.AsyncClient(headers=bearer(secret), timeout=FETCH_S, trust_env=False)
    pages = Pages(front, pool, metrics, Assets(client), secret)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        async with client, anyio.create_task_group() as tasks:
            tasks.start_soon(pool.run)
            yield
            tasks.cancel_scope.cancel()
        await _close(journal)

    link = link_route(front.serve, requests=wire.Request, secret=secret, pace=pace, stats=edges)
    return Starlette(routes=[link, *pages.routes()], lifespan=lifespan)


class Pages:
    """What a front answers to plain requests."""

    def __init__(
        self, front: Front, pool: Pool, metrics: FrontMetrics, assets: Assets, secret: str
    ) -> None:
        self._front = front
        self._pool = pool
        self._metrics = metrics
        self._assets = assets
        self._secret = secret

    def routes(self) -> list[Route]:
        guard = [Middleware(NeedsSecret, secret=self._secret)]
        return [
            Route("/v1/report", self._get_report, middleware=guard),
            Route("/v1/assets/{digest}", self._get_assets, middleware=guard),
            Route("/v1/workers", self._workers, methods=["GET", "PUT"], middleware=guard),
            Route("/health", self._get_health),
            Route("/ready", self._get_ready),
            Route("/metrics", self._get_metrics),
        ]

    async def _get_report(self, request: Request) -> Response:
        return Response(json.encode(self._front.report()), media_type="application/json")

    async def _get_assets(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        body = await self._assets.get(digest, self._pool.urls_with_tokenizer(digest))
        if body is None:
            return PlainTextResponse("no worker here has these assets", status_code=404)
        return Response(body, media_type="application/vnd.msgpack")

    async def _workers(self, request: Request) -> Response:
        """The workers of the region; by PUT, other ones from now on."""
        if request.method == "PUT":
            try:
                self._pool.set_workers(parse_workers(await request.body()))
            except NameTaken as exc:
                return PlainTextResponse(str(exc), status_code=409)
            except ValueError as exc:
                return PlainTextResponse(str(exc), status_code=400)
        return Response(json.encode(self._pool.rows()), media_type="application/json")

    async def _get_health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _get_ready(self, request: Request) -> Response:
        why = self._front.unready
        return PlainTextResponse(why or "ready", 503 if why else 200)

    async def _get_metrics(self, request: Request) -> Response:
        content = generate_latest(self._metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)


async def _close(journal: Journal | None) -> None:
    if journal is not None:
        await to_thread.run_sync(journal.close)


def unix_time() -> float:
    return datetime.now(UTC).timestamp()


def run(settings: FrontSettings) -> None:
    """Serve until told to stop by SIGTERM or SIGINT."""
    secret = read_secret(settings.secret_file)
    listener = listening_socket(settings.host, settings.port, settings.fd)
    drain = Drain(settings.grace_s)
    try:
        app = create_app(settings, secret, address(listener), drain=drain)
    except CANNOT as exc:
        sys.exit(f"--journal {settings.journal}: {exc}")
    serve_app(app, host=settings.host, port=settings.port, fd=listener.detach(), drain=drain)
