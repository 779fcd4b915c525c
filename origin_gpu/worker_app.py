"""A worker process: its roles behind one link, its KV door, and what it says of itself."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial

import anyio
from msgspec import json, msgpack
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from origin_gpu.decode import DecodeRole, Transport
from origin_gpu.embed import EmbedRole
from origin_gpu.engine_link import EngineGone
from origin_gpu.handover import Fetch, Prefill, Resume, Watch, Watched, WorkerEvent, WorkerRequest
from origin_gpu.kv_files import open_files, roots
from origin_gpu.kv_nixl import Nixl, NotInstalled
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_transfer import DoorTransport, KVDoor
from origin_gpu.kv_warm import WarmFiles
from origin_gpu.kv_ways import Way
from origin_gpu.models import FolderError, read_assets
from origin_gpu.prefill import PrefillRole
from origin_gpu.settings import WorkerSettings
from origin_gpu.worker import Worker
from origin_gpu.worker_metrics import EngineCollector, WorkerMetrics
from routing import wire
from routing.link_flow import Wake
from routing.link_frames import LinkStats, Pace
from routing.link_server import Stream, link_route
from routing.secret import NeedsSecret, read_secret
from routing.serving import address, listening_socket, serve_app

logger = logging.getLogger(__name__)

TELL_EVERY_S = 1.0
TELL_AT_MOST_EVERY_S = 0.1
TELL_CACHE_EVERY_S = 0.05


class WorkerApp:
    """What one worker process owns, and who answers what."""

    def __init__(self, worker: Worker, secret: str, transport: Transport) -> None:
        self.worker = worker
        self.secret = secret
        self.prefill = PrefillRole(worker)
        self.decode = DecodeRole(worker, transport)
        self.embed = EmbedRole(worker)
        self.gone: EngineGone | None = None  # why this process has to end

    async def serve(self, stream: Stream[WorkerRequest, WorkerEvent]) -> None:
        """Answer one stream of a link. Raises Failure."""
        match stream.request:
            case Watch(peers):
                self.worker.peers = {peer.name: peer for peer in peers}
                await self._watch(stream)
            case Prefill(request):
                async with self.worker.answering("prefill", request) as answered:
                    await self.prefill.serve(request, stream, answered)
            case Fetch(ticket):
                await self.decode.fetch(ticket)
            case Resume(request, prefilled):
                async with self.worker.answering("decode", request) as answered:
                    await self.decode.serve(request, prefilled, stream, answered)
            case wire.Generate() as request:
                async with self.worker.answering("both", request) as answered:
                    await self.decode.serve_whole(request, stream, answered)
            case wire.Embed() as request:
                async with self.worker.answering("both", request) as answered:
                    await self.embed.serve(request, stream, answered)

    async def keep_engine(self) -> None:
        """Until cancelled, or until no engine can be kept: then this process stops."""
        try:
            await self.worker.engine.run()
        except EngineGone as gone:
            self.gone = gone
            logger.error("no engine", extra={"fields": {"reason": str(gone)}})
            os.kill(os.getpid(), signal.SIGTERM)

    async def _watch(self, stream: Stream[WorkerRequest, WorkerEvent]) -> None:
        """Say how this worker is, on change and every second, as long as somebody listens."""
        engine, drain, changed = self.worker.engine, self.worker.drain, Wake()
        engine.listeners.add(changed)
        drain.listeners.add(tell := changed.set)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tell_cache, stream)
                while True:
                    said = self._watched()
                    stream.send(said)
                    await anyio.sleep(TELL_AT_MOST_EVERY_S)
                    with anyio.move_on_after(TELL_EVERY_S):
                        while self._watched() == said:
                            await changed.wait()
        finally:
            engine.listeners.discard(changed)
            drain.listeners.discard(tell)

    async def _tell_cache(self, stream: Stream[WorkerRequest, WorkerEvent]) -> None:
        """Say what comes into the engine's prefix cache and what goes, many blocks at once; a large
        cache not in one frame, over which its reader would have time for nothing else."""
        with self.worker.engine.cache.reader() as reader:
            while True:
                await reader.wake.wait()
                while news := reader.take():
                    stream.send(news)
                    await anyio.sleep(TELL_CACHE_EVERY_S)

    def _watched(self) -> Watched:
        return Watched(
            report=self.worker.report(),
            kv_address=self.worker.door.address,
            layout_digest=self.worker.engine.layout_digest,
            block_tokens=self.worker.engine.cached_block_tokens,
        )


@contextmanager
def worker_app(
    settings: WorkerSettings, secret: str, url: str, registry: CollectorRegistry
) -> Generator[WorkerApp, None, None]:
    """A worker that is reached at `url`; its files are gone when the block is left.

    Raises FolderError, NotInstalled.
    """
    assets = read_assets(settings.model_dir)
    ways, metrics = _ways(settings), WorkerMetrics(registry)
    with (
        open_files(roots()) as kv_files,
        closing(WarmFiles()) as warm,
        KVDoor(settings.host, secret, ways=ways, denied=partial(metrics.refused, "door")) as door,
    ):
        worker = Worker(settings, url, assets, door, kv_files, metrics)
        registry.register(EngineCollector(worker.engine))
        yield WorkerApp(worker, secret, DoorTransport(secret, ways=ways, warm=warm))


def _ways(settings: WorkerSettings) -> list[Way]:
    """Raises NotInstalled."""
    made: dict[str, Callable[[], Way]] = {"shared": SharedFiles, "nixl": Nixl}
    return [made[kind]() for kind in settings.kv_ways]


class Pages:
    """What a worker answers to plain GETs."""

    def __init__(self, app: WorkerApp, registry: CollectorRegistry) -> None:
        self._worker = app.worker
        self._secret = app.secret
        self._registry = registry

    def routes(self) -> list[Route]:
        guard = [Middleware(NeedsSecret, secret=self._secret)]
        return [
            Route("/v1/report", self._report, middleware=guard),
            Route("/v1/assets/{digest}", self._assets, middleware=guard),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
        ]

    async def _report(self, request: Request) -> Response:
        return Response(json.encode(self._worker.report()), media_type="application/json")

    async def _assets(self, request: Request) -> Response:
        if request.path_params["digest"] != self._worker.assets_digest:
            return PlainTextResponse("this worker has other assets", status_code=404)
        return Response(msgpack.encode(self._worker.assets), media_type="application/vnd.msgpack")

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _ready(self, request: Request) -> Response:
        if self._worker.drain.begun:
            return PlainTextResponse("it is being stopped", status_code=503)
        if self._worker.engine.fresh:
            return PlainTextResponse("ready")
        return PlainTextResponse("the engine is not up, or says nothing", status_code=503)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def create_app(
    app: WorkerApp, registry: CollectorRegistry, *, pace: Pace | None = None
) -> Starlette:
    """The worker as an ASGI app."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app.keep_engine)
            tasks.start_soon(app.worker.door.run)
            yield
            tasks.cancel_scope.cancel()

    stats = LinkStats()
    app.worker.drain.num_left = lambda: stats.num_open  # KV to collect keeps its stream open
    link = link_route(
        app.serve,
        requests=WorkerRequest,
        secret=app.secret,
        pace=pace,
        stats=stats,
        lasting=Watch,
    )
    return Starlette(routes=[link, *Pages(app, registry).routes()], lifespan=lifespan)


def run(settings: WorkerSettings) -> int:
    """Serve until told to stop by SIGTERM or SIGINT; the exit code."""
    secret = read_secret(settings.secret_file)
    listener = listening_socket(settings.host, settings.port, settings.fd)
    registry = CollectorRegistry()
    try:
        with worker_app(settings, secret, address(listener), registry) as app:
            serve_app(
                create_app(app, registry),
                host=settings.host,
                port=settings.port,
                fd=listener.detach(),
                drain=app.worker.drain,
            )
    except FolderError as error:
        logger.error("no model", extra={"fields": {"reason": str(error)}})
        return 1
    except NotInstalled as error:
        logger.error("no NIXL", extra={"fields": {"reason": str(error)}})
        return 1
    return 1 if app.gone else 0
