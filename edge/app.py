"""The edge worker as an ASGI application: its routes, and the tasks behind them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
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
from starlette.types import ASGIApp

from edge import completions, embeddings, openai, responses, responses_run
from edge.allowance import Allowance
from edge.api import Api
from edge.auth import Verifier
from edge.batch_lines import Check
from edge.clients import Clients
from edge.complete import Walk
from edge.compress import Gzip
from edge.cors import Cors
from edge.counts import count_routes
from edge.door import Door, no_route, wrong_method
from edge.embed import EmbedWalk
from edge.ledger import Ledger, open_ledger
from edge.limits import PRESETS
from edge.meter import Meter
from edge.metrics import Metrics
from edge.pages import Pages
from edge.places import Places
from edge.prices import Prices
from edge.queued import Queueable
from edge.request_logs import RequestLogs
from edge.response import JSON
from edge.responses_store import ResponsesStore
from edge.run import (
    Anthropic,
    Enveloped,
    Native,
    Run,
    Service,
    chat_completions,
    text_completions,
)
from edge.settings import Settings
from edge.store import Store
from edge.stored import Stored
from edge.texts import TextStore
from edge.usage_page import UsagePage
from edge.vectors import Embeddings
from edge.watch import Watch
from routing.catalogue import Catalogue, load_catalogue
from routing.choose import task
from routing.drain import Drain
from routing.errors import Code, Failure
from routing.region import ProcessReport
from routing.secret import authorized

AI = "/client/v4/accounts/{account_id}/ai"
V1S = (f"{AI}/v1", "/v1")
WORKERS_AI_MAX_TOKENS = 256  # natively, where a request names none, by its documents
_WARM_S, _WARM_AGAIN_S = 0.5, 10.0  # between looks for new tokenizers; after one was not to be had


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What an edge is made of."""

    settings: Settings
    client: httpx2.AsyncClient
    watch: Watch
    texts: TextStore
    ledger: Ledger | None
    logs: RequestLogs | None
    metrics: Metrics
    catalogue: Catalogue
    prices: Prices
    service: Service
    stored: Stored | None
    responses: ResponsesStore

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        async with self.client, anyio.create_task_group() as tasks:
            tasks.start_soon(self.watch.run)
            tasks.start_soon(self.service.clients.run)
            tasks.start_soon(self.service.allowance.run)
            tasks.start_soon(_keep_warm, self.watch, self.texts)
            if self.stored is not None:
                tasks.start_soon(self.stored.run, app)
            yield
            tasks.cancel_scope.cancel()
        await self._close()

    async def _close(self) -> None:
        if self.stored is not None:
            await self.stored.close()
        self.service.places.close()
        await to_thread.run_sync(self.service.allowance.close)
        if self.ledger is not None:
            await to_thread.run_sync(self.ledger.close)

    def routes(self) -> list[Route]:
        service, verifier = self.service, self.service.verifier
        usage = UsagePage(verifier, self.settings.ledger, self.prices, unix_time)
        pages = Pages(watch=self.watch, verifier=verifier, catalogue=self.catalogue)
        return [
            *_run_routes(service, self.stored, self._task_of),
            *_response_routes(service, self.stored, self.responses),
            *(self.stored.routes(AI, V1S) if self.stored else ()),
            Route(f"{AI}/usage", usage.get),
            *_operator_routes(service, self.watch, self.metrics),
            *pages.routes(AI, V1S),
        ]

    def _task_of(self, model: str) -> str:
        """What the model is for, as the regions that serve it say, or as its row does."""
        return task(self.watch.known(), model) or self.prices.task(model)

    def middleware(self) -> list[Middleware]:
        door = Middleware(
            Door,
            metrics=self.metrics,
            ledger=self.ledger,
            allowance=self.service.allowance,
            drain=self.service.drain,
            logs=self.logs,
        )
        return [Middleware(Cors, origins=self.settings.cors_origins), Middleware(Gzip), door]


def create_app(settings: Settings, drain: Drain | None = None) -> Starlette:
    parts = _parts(settings, drain or Drain(settings.grace_s))
    app = Starlette(
        routes=parts.routes(),
        middleware=parts.middleware(),
        exception_handlers={404: no_route, 405: wrong_method},
        lifespan=parts.lifespan,
    )
    app.router.redirect_slashes = False  # a wrong address is told, not guessed at
    return app


def _parts(settings: Settings, drain: Drain) -> _Parts:
    client = httpx2.AsyncClient(trust_env=False)  # a proxy of the operator's is not for regions
    watch = Watch(settings.regions, settings.secret, client)
    texts = TextStore(settings.cache_dir / "assets", watch.text_assets)
    ledger = open_ledger(settings.ledger, unix_time) if settings.ledger else None
    store = Store(settings.store) if settings.store else None
    logs = RequestLogs(unix_time) if settings.store else None
    metrics = Metrics(watch, ledger)
    drain.num_left = lambda: metrics.num_in_flight
    catalogue = load_catalogue(settings.catalogue)
    prices = Prices(catalogue.rows)
    service = Service(
        settings=settings,
        verifier=Verifier(settings.keys_dir, unix_time),
        places=Places(settings.trusted_proxies, settings.geo_db),
        clients=Clients(settings.stalled_reader_s),
        walk=Walk(
            watch,
            texts,
            budget_s=settings.budget_s,
            max_output_tokens=settings.max_output_tokens,
            cold_s=settings.cold_s,
        ),
        embeds=EmbedWalk(watch, texts, budget_s=settings.budget_s),
        allowance=_allowance(settings, prices),
        drain=drain,
    )
    stored = _stored(store, service, logs)
    if stored is not None:
        metrics.keep(stored)
    return _Parts(
        settings=settings,
        client=client,
        watch=watch,
        texts=texts,
        ledger=ledger,
        logs=logs,
        metrics=metrics,
        catalogue=catalogue,
        prices=prices,
        service=service,
        stored=stored,
        responses=ResponsesStore(store, unix_time),
    )


def _run_routes(
    service: Service, stored: Stored | None, task_of: Callable[[str], str]
) -> list[Route]:
    """Where models are run. What an OpenAI client sends needs no account in its address."""
    strict = service.settings.compat == "workers-ai"
    most = WORKERS_AI_MAX_TOKENS if strict else None
    native = Native(task_of, most)
    named = Enveloped(task_of, most)
    posts: dict[str, Api] = {f"{AI}/run/{{model:path}}": native, f"{AI}/run": named}
    for v1 in V1S:
        posts[f"{v1}/chat/completions"] = chat_completions()
        posts[f"{v1}/completions"] = text_completions()
        posts[f"{v1}/embeddings"] = Embeddings()
        posts[f"{v1}/messages"] = Anthropic()

    def endpoint(api: Api) -> ASGIApp:
        queued = api if isinstance(api, Native) else None
        return _around(stored, Run(service, api), api.route, queued)

    return [Route(path, endpoint(api), methods=["POST"]) for path, api in posts.items()]


def _response_routes(service: Service, stored: Stored | None, store: ResponsesStore) -> list[Route]:
    around = partial(_around, stored)
    return [
        route
        for v1 in V1S
        for route in (
            *count_routes(v1, service, store),
            *responses_run.routes(v1, service, store, around),
        )
    ]


def _around(
    stored: Stored | None, endpoint: ASGIApp, route: str, queued: Queueable | None = None
) -> ASGIApp:
    """An endpoint that runs a model, with what goes around it where there is a store."""
    return endpoint if stored is None else stored.around(endpoint, route, queued)


def _stored(store: Store | None, service: Service, logs: RequestLogs | None) -> Stored | None:
    if store is None or logs is None:
        return None
    checks: dict[str, Check] = {
        "/v1/chat/completions": openai.parse,
        "/v1/completions": completions.parse,
        "/v1/embeddings": embeddings.parse,
        "/v1/responses": responses.parse,
    }
    return Stored(store, service, logs, unix_time, checks)


def _allowance(settings: Settings, prices: Prices) -> Allowance:
    path = settings.ledger.with_name("limits.sqlite") if settings.ledger else None
    return Allowance(PRESETS[settings.limits], Meter(path, unix_time), prices)


def unix_time() -> float:
    return datetime.now(UTC).timestamp()


def _operator_routes(service: Service, watch: Watch, metrics: Metrics) -> list[Route]:
    epoch, settings = uuid4().hex, service.settings

    def is_ready() -> bool:
        return watch.ready() and not service.drain.begun

    async def health(request: Request) -> Response:
        return _json({"healthy": True})

    async def ready(request: Request) -> Response:
        ready_now = is_ready()
        return _json({"ready": ready_now}, 200 if ready_now else 503)

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
                ready=is_ready(),
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


async def _keep_warm(watch: Watch, texts: TextStore) -> None:
    """Have every model's tokenizer built before its first request, until cancelled."""
    while True:
        all_there = await texts.warm(watch.tokenizer_digests())
        await anyio.sleep(_WARM_S if all_there else _WARM_AGAIN_S)
