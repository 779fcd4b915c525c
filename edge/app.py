"""The edge worker as an ASGI application: its routes, and the tasks behind them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import anyio
import httpx2
import msgspec
from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.auth import Verifier
from edge.clients import Clients
from edge.complete import Walk
from edge.door import JSON, Door, no_route, wrong_method
from edge.ledger import open_ledger
from edge.metrics import Metrics
from edge.places import Places
from edge.run import Native, OpenAI, Run, Service
from edge.settings import Settings
from edge.texts import TextStore
from edge.watch import Watch
from routing.errors import Code, Failure
from routing.region import ProcessReport
from routing.secret import authorized

AI = "/client/v4/accounts/{account_id}/ai"
_FIRST_REPORTS_S, _LOOK_S = 1.0, 0.02  # that a new edge waits for its regions, and looks at them
_WARM_S, _WARM_AGAIN_S = 0.5, 10.0  # between looks for new tokenizers; after one was not to be had


def create_app(settings: Settings) -> Starlette:
    client = httpx2.AsyncClient(trust_env=False)  # a proxy of the operator's is not for regions
    watch = Watch(settings.regions, settings.secret, client)
    texts = TextStore(settings.cache_dir / "assets", watch.text_assets)
    ledger = open_ledger(settings.ledger, unix_time) if settings.ledger else None
    metrics = Metrics(watch, ledger)
    service = Service(
        settings=settings,
        verifier=Verifier(settings.keys_dir, unix_time),
        places=Places(settings.trusted_proxies, settings.geo_db),
        clients=Clients(settings.stalled_reader_s),
        walk=Walk(
            watch, texts, budget_s=settings.budget_s, max_output_tokens=settings.max_output_tokens
        ),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        async with client, anyio.create_task_group() as tasks:
            tasks.start_soon(watch.run)
            tasks.start_soon(service.clients.run)
            tasks.start_soon(_keep_warm, watch, texts)
            await _wait_ready(watch)
            yield
            tasks.cancel_scope.cancel()
        service.places.close()
        if ledger is not None:
            await to_thread.run_sync(ledger.close)

    app = Starlette(
        routes=[
            Route(f"{AI}/run/{{model:path}}", Run(service, Native()), methods=["POST"]),
            Route(f"{AI}/v1/chat/completions", Run(service, OpenAI()), methods=["POST"]),
            *_operator_routes(settings, watch, metrics),
        ],
        middleware=[Middleware(Door, metrics=metrics, ledger=ledger)],
        exception_handlers={404: no_route, 405: wrong_method},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a wrong address is told, not guessed at
    return app


def unix_time() -> float:
    return datetime.now(UTC).timestamp()


def _operator_routes(settings: Settings, watch: Watch, metrics: Metrics) -> list[Route]:
    epoch = uuid4().hex

    async def health(request: Request) -> Response:
        return _json({"healthy": True})

    async def ready(request: Request) -> Response:
        is_ready = watch.ready()
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def report(request: Request) -> Response:
        if not authorized(request.headers, settings.secret):
            raise Failure(Code.UNAUTHENTICATED, "the fleet's secret is needed here")
        host, port = request.scope["server"]
        is_v6 = ":" in host
        return _json(
            ProcessReport(
                name=settings.name,
                region="",  # an edge is in none
                role="edge",
                pid=os.getpid(),
                url=f"http://[{host}]:{port}" if is_v6 else f"http://{host}:{port}",
                epoch=epoch,
                ready=watch.ready(),
                in_flight=metrics.num_in_flight,
            )
        )

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", show_metrics),
        Route("/v1/report", report),
    ]


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)


async def _wait_ready(watch: Watch) -> None:
    """Let who called while this edge was started again wait a little, for they would be refused
    until a region has said how it is."""
    with anyio.move_on_after(_FIRST_REPORTS_S):
        while True:
            if watch.ready():
                return
            await anyio.sleep(_LOOK_S)


async def _keep_warm(watch: Watch, texts: TextStore) -> None:
    """Have every model's tokenizer built before its first request, until cancelled."""
    while True:
        all_there = await texts.warm(watch.tokenizer_digests())
        await anyio.sleep(_WARM_S if all_there else _WARM_AGAIN_S)
