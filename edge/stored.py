"""All that stands on the store, put together: its routes, what goes around others, its tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edge import files, jobs, responses_store
from edge.batch_files import BatchFiles
from edge.batch_lines import Check
from edge.envelope import envelope
from edge.gateway import Gateway
from edge.job_runner import JobRunner
from edge.log_search import LogRoutes
from edge.openai_batches import OpenAIBatches
from edge.openai_files import OpenAIFiles
from edge.queued import Queue, Queueable, body_of
from edge.replies import Replies
from edge.replies import prune as prune_replies
from edge.request_logs import RequestLogs
from edge.request_logs import prune as prune_logs
from edge.run import Service
from edge.store import Db, Store, StoreAway
from edge.store_routes import Ground, told
from edge.webhooks import Webhooks, secret_of, spelled

logger = logging.getLogger(__name__)

PRUNE_S = 30.0  # between looks for what may go
_PRUNED_AT_ONCE = 200  # rows in one transaction: others wait for it


class Stored:
    """`checks`: of each endpoint of batches, what its route would refuse."""

    def __init__(
        self,
        store: Store,
        service: Service,
        logs: RequestLogs,
        clock: Callable[[], float],
        checks: dict[str, Check],
    ) -> None:
        settings = service.settings
        self._store = store
        self._logs = logs
        self._clock = clock
        self._service = service
        self._ground = ground = Ground(
            store=store,
            settings=settings,
            verifier=service.verifier,
            drain=service.drain,
            clock=clock,
        )
        keep_s = settings.result_days * 86_400
        self._runner = JobRunner(
            store,
            service.drain,
            clock,
            batches=BatchFiles(
                store, clock, checks, keep_s=keep_s, most_bytes=settings.body_limit_bytes
            ),
            in_flight=settings.batch_in_flight,
        )
        self._webhooks = Webhooks(
            store,
            service.drain,
            clock,
            body_of,
            allow_private=settings.allow_private_webhooks,
        )
        self._replies = Replies(ground, service.clients)

    @property
    def store_calls(self) -> Mapping[str, int]:
        return self._store.calls

    @property
    def store_busy_s(self) -> float:
        return self._store.busy_s

    @property
    def job_requests(self) -> Mapping[tuple[str, str], int]:
        return self._runner.answered

    @property
    def webhook_calls(self) -> Mapping[str, int]:
        return self._webhooks.calls

    def routes(self, ai: str, v1s: Sequence[str]) -> list[Route]:
        openai = (OpenAIFiles(self._ground), OpenAIBatches(self._ground, self._runner.wake))
        return [
            *(route for it in openai for v1 in v1s for route in it.routes(v1)),
            *LogRoutes(self._ground).routes(ai),
            Route(f"{ai}/webhooks/secret", self._show_secret, methods=["GET"]),
        ]

    def around(
        self,
        endpoint: ASGIApp,
        route: str,
        queued: Queueable | None = None,
    ) -> ASGIApp:
        """The endpoint with what any request may ask of the store; as `queued` reads them,
        requests to it may be queued. `route` as in logs."""
        queue = None
        if queued is not None:
            queue = Queue(self._ground, self._service.walk, queued, self._runner.wake)
        return Gateway(endpoint, route, self._ground, self._replies, queue)

    async def run(self, app: ASGIApp) -> None:
        """Work on jobs by asking `app`, and keep the store in order, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._runner.run, app)
            tasks.start_soon(self._webhooks.run)
            tasks.start_soon(self._logs.run, self._store)
            tasks.start_soon(self._prune)

    async def close(self) -> None:
        """Write what there is to be written. `run` is over."""
        await self._logs.close(self._store)
        self._store.close()

    async def _prune(self) -> None:
        log_s = self._service.settings.log_days * 86_400
        while True:
            for drop in (
                jobs.prune,
                files.prune,
                responses_store.prune,
                prune_replies,
                partial(prune_logs, log_s=log_s),
            ):
                await self._prune_all(drop)
            await anyio.sleep(PRUNE_S)

    async def _prune_all(self, drop: Callable[[Db, float, int], int]) -> None:
        """As long as there is something to drop, with room for others between."""

        def drop_some(db: Db) -> int:
            return drop(db, self._clock(), _PRUNED_AT_ONCE)

        num_dropped = _PRUNED_AT_ONCE
        while num_dropped >= _PRUNED_AT_ONCE:
            try:
                num_dropped = await self._store.write(drop_some)
            except StoreAway:
                return
            await anyio.sleep(0.05)

    async def _show_secret(self, request: Request) -> Response:
        """What the account's webhooks are signed with."""
        tenant = self._ground.tenant(request.scope, request.headers, "webhooks")
        key = await self._store.write(partial(secret_of, account=tenant.account))
        return told(envelope({"secret": spelled(key)}))
