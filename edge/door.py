"""What every request passes on its way in and out: an id, a line in the log, a row of usage, and no
traceback. Once the edge is told to stop, nothing new passes.

Expected failures leave as the error of the API that was asked. Whatever else is raised is a bug: it
is logged, and the client gets a number to ask about. Knows no route but the shape of errors.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import cast
from uuid import uuid4

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge import anthropic, openai, workers_ai
from edge.allowance import Allowance
from edge.ledger import Ledger
from edge.limits import headers_of
from edge.metrics import Metrics, Record
from edge.request_logs import RequestLogs
from edge.response import JSON
from routing.drain import Drain
from routing.errors import Code, Failure

logger = logging.getLogger(__name__)

# Who spells a refusal: the first whose paths begin so. Account-less forms are behind no /client/v4.
_V1 = r"/(client/v4/accounts/[^/]*/ai/)?v1/"
_SPELLERS: tuple[tuple[re.Pattern[str], Callable[[Failure], bytes]], ...] = (
    (re.compile(_V1 + "messages(/|$)"), anthropic.error),
    (re.compile(_V1), openai.error),
    (re.compile(""), workers_ai.error),
)
_QUIET = {"/health", "/ready", "/metrics", "/v1/report"}  # asked each second, of no interest
# Where workerd, OpenAI's clients and Anthropic's look for the request's id.
_ID_HEADERS = (b"cf-ai-req-id", b"x-request-id", b"request-id")
_RETRY_AFTER_S = 1.0  # where a failure names no time
_MOST_SHOWN = 200  # characters of a path in a message


class Door:
    """ASGI middleware, outside of all routes."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        ledger: Ledger | None,
        allowance: Allowance,
        drain: Drain,
        logs: RequestLogs | None = None,
    ) -> None:
        self._app = app
        self._allowance = allowance
        self._metrics = metrics
        self._ledger = ledger
        self._drain = drain
        self._logs = logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(request_id=uuid4().hex, started=time.monotonic())
        scope.setdefault("state", {})["record"] = record
        if scope["path"] in _QUIET:
            await self._guarded(record, scope, receive, send)
            return
        self._metrics.began()
        try:
            await self._guarded(record, scope, receive, send)
        except anyio.get_cancelled_exc_class():
            record.outcome = "stopped"  # with the server
            raise
        finally:
            now = time.monotonic()
            self._metrics.ended(record, now)
            for each in (record, *record.further):
                self._allowance.note(each)
                if self._ledger is not None:
                    self._ledger.note(each, now)
            if self._logs is not None:
                self._logs.note(record, now)

    async def _guarded(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        marks = [(name, record.request_id.encode()) for name in _ID_HEADERS]

        async def send_marked(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record.status = message["status"]
                limits = headers_of(record.standings)
                more = [*marks, *limits, *record.headers, *self._parting()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            if scope["path"] not in _QUIET:
                self._drain.check()
            await self._app(scope, receive, send_marked)
        except Failure as exc:
            failure = exc
        except Exception:  # the one place where a bug here meets a client
            fields = {"request_id": record.request_id}
            logger.exception("request failed", extra={"fields": fields})
            failure = Failure(Code.INTERNAL, f"internal error, request {record.request_id}")
        else:
            return
        record.outcome, record.detail = failure.code.value, failure.detail
        if not begun:
            await refusal(scope["path"], failure)(scope, receive, send_marked)

    def _parting(self) -> list[tuple[bytes, bytes]]:
        """Whoever comes again is to come by another connection, to another process."""
        return [(b"connection", b"close")] if self._drain.begun else []


def record_of(scope: Scope) -> Record:
    return cast("Record", scope["state"]["record"])


def refusal(path: str, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    """The failure as the API at `path` tells it."""
    error = next(error for paths, error in _SPELLERS if paths.match(path))
    status = failure.code.meaning.status
    more = dict(headers or {})
    if status in {429, 503} or failure.retry_after_s:
        more["retry-after"] = str(ceil(failure.retry_after_s or _RETRY_AFTER_S))
    if failure.code is Code.QUOTA:
        more["x-should-retry"] = "false"  # OpenAI's clients would, after seconds
    if failure.code is Code.UNAUTHENTICATED:
        more["www-authenticate"] = "Bearer"
    return Response(error(failure), status, more, JSON)


async def no_route(request: Request, exc: Exception) -> Response:
    """Starlette's 404."""
    path = request.url.path
    says = f"Could not route to {path[:_MOST_SHOWN]}, perhaps your object identifier is invalid?"
    return _told(request, Failure(Code.NO_ROUTE, says))


async def wrong_method(request: Request, exc: Exception) -> Response:
    """Starlette's 405, which knows the methods that are allowed."""
    assert isinstance(exc, HTTPException)
    says = f"Method {request.method} not available for that URI"
    return _told(request, Failure(Code.WRONG_METHOD, says), exc.headers)


def _told(request: Request, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    record = record_of(request.scope)
    record.outcome, record.detail = failure.code.value, failure.detail
    return refusal(request.url.path, failure, headers)
