"""Asynchronous requests of the native API: `POST /ai/run/{model}?queueRequest=true`, or without
the model in its address.

One body queues many requests, or one; a body that holds a request id asks how it stands. What would
be refused when asked alone is refused when it is queued, as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import msgspec
from anyio import to_thread
from msgspec import Raw, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge import jobs
from edge.auth import Tenant
from edge.batch_lines import MOST_REQUESTS, Check, checked
from edge.checks import BadField, Fields, as_fields, read
from edge.complete import Walk
from edge.door import record_of
from edge.envelope import envelope, error_envelope
from edge.jobs import Extra, Item, Job
from edge.public_urls import checked_url
from edge.response import JSON
from edge.store import Db
from edge.store_routes import Ground, no_such, told
from edge.webhooks import Hook
from routing.errors import Code, Failure

DEADLINE_S = 86_400.0  # that a job has for its requests
MOST_JOBS = 100  # of one account that are not done
_MOST_REFERENCE_CHARS = 1000
_ID = "request_id"


class Queueable(Protocol):
    """How a route's bodies are read."""

    def opened(self, fields: Fields, scope: Scope) -> tuple[Fields, str]:
        """What the model is given, and which model. Raises Failure(BAD_INPUT)."""

    def check(self, body: bytes, model: str) -> object:
        """Refuse what the model would not be given. Raises Failure(BAD_INPUT)."""


class Queue:
    """An ASGI endpoint of requests to another route; `wake` says that there is something to do."""

    def __init__(
        self,
        ground: Ground,
        walk: Walk,
        route: Queueable,
        wake: Callable[[], None],
    ) -> None:
        self._ground = ground
        self._walk = walk
        self._route = route
        self._wake = wake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, ground = Request(scope, receive), self._ground
        tenant = ground.tenant(scope, request.headers, "queue")
        body = await ground.body(request)
        whole = await to_thread.run_sync(read, body)
        fields, model = (whole, "") if whole.has(_ID) else self._route.opened(whole, scope)
        if fields.has(_ID):
            record_of(scope).logged = False  # they are many
            response = await self._stands(tenant, fields.text(_ID) or "")
        else:
            record_of(scope).model = model[:128]
            with ground.drain.until_cut():
                await self._walk.wait_settled()
                await self._walk.wait_served(model)
            said = whole.text("webhook") or fields.text("webhook")
            webhook = said or request.query_params.get("webhook") or ""
            read_all = partial(_requests, fields, lambda body: self._route.check(body, model))
            asked = await to_thread.run_sync(read_all)
            response = await self._add(tenant, model, asked, webhook)
        await response(scope, receive, send)

    async def _add(
        self, tenant: Tenant, model: str, asked: list[tuple[str | None, bytes]], webhook: str
    ) -> Response:
        now = self._ground.clock()
        job = Job(
            id=str(uuid4()),
            account=tenant.account,
            key_id=tenant.key_id,
            kind="queue",
            route=f"run/{model}",
            model=model,
            status="queued",
            created=now,
            deadline=now + DEADLINE_S,
            forget=now + DEADLINE_S + self._ground.settings.result_days * 86_400,
            total=len(asked),
            webhook=checked_url(webhook, "/webhook") if webhook else "",
            extra=msgspec.json.encode(Extra(grant=tenant.grant)),
        )
        await self._ground.store.write(partial(_add, job=job, asked=asked))
        self._wake()
        return told(envelope({"status": "queued", "request_id": job.id, "model": model}))

    async def _stands(self, tenant: Tenant, job: str) -> Response:
        stands = partial(_stands, account=tenant.account, job=job)
        body = await self._ground.store.look_through(tenant.account, stands)
        if body is None:
            raise no_such(_ID, job)
        return Response(body, media_type=JSON)


def is_queued(scope: Scope) -> bool:
    """Whether a request to the run route is one for here."""
    said = Request(scope).query_params.get("queueRequest", "")
    return said.lower() in {"true", "1"}


def check_room(db: Db, account: str) -> None:
    """Failure when the account has too much to be done."""
    if jobs.num_open(db, account) >= MOST_JOBS:
        says = f"{MOST_JOBS} queued jobs of this account are not done yet"
        raise Failure(Code.NO_CAPACITY, says, retry_after_s=60.0)


def body_of(db: Db, hook: Hook) -> bytes | None:
    """What a webhook is told of a job that is done."""
    job = jobs.find(db, hook.account, hook.job, "queue")
    if job is None:
        return None
    head = {"request_id": job.id, "model": job.model, "status": job.status}
    return msgspec.json.encode(envelope(head | _result(db, job)))


def _add(db: Db, job: Job, asked: list[tuple[str | None, bytes]]) -> None:
    check_room(db, job.account)
    jobs.add(db, job)
    jobs.add_items(db, job.id, asked)


def _requests(fields: Fields, check: Check) -> list[tuple[str | None, bytes]]:
    """Reference and body of each; the first that is wrong is named."""
    many, at = fields.array("requests"), fields.at("requests")
    if many is None:
        alone = {name: value for name, value in fields.items() if name != "webhook"}
        return [_request(alone, fields.at(), check)]
    if not 1 <= len(many) <= MOST_REQUESTS:
        says = f"'{at}' must have 1 to {MOST_REQUESTS} items, got {len(many)}"
        raise BadField(at, says)
    return [_request(value, f"{at}/{n}", check) for n, value in enumerate(many)]


def _request(value: Any, pointer: str, check: Check) -> tuple[str | None, bytes]:
    fields = as_fields(pointer, value)
    reference = fields.text("external_reference")
    if reference is not None and len(reference) > _MOST_REFERENCE_CHARS:
        at = fields.at("external_reference")
        raise BadField(at, f"'{at}' must have <= {_MOST_REFERENCE_CHARS} characters")
    body = {name: it for name, it in fields.items() if name != "external_reference"}
    return reference, checked(body, pointer, check)


class _Answer(Struct):
    """The body of one request's answer."""

    result: Raw = Raw(b"null")
    success: bool = False
    errors: Raw = Raw(b"[]")


def _stands(db: Db, account: str, job: str) -> bytes | None:
    found = jobs.find(db, account, job, "queue")
    if found is None:
        return None
    if found.ended is None:
        result = {"status": found.status, "request_id": found.id, "model": found.model}
    else:
        result = _result(db, found)
    return msgspec.json.encode(envelope(result))


def _result(db: Db, job: Job) -> dict[str, Any]:
    usage = {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
    }
    return {"responses": [_response(item) for item in jobs.items(db, job.id)], "usage": usage}


def _response(item: Item) -> dict[str, Any]:
    """One request's answer among the others; `id` is its place."""
    named = {} if item.name is None else {"external_reference": item.name}
    if item.answer is None:
        late = Failure(Code.TIMEOUT, "there was no room for this request in time")
        return {"id": item.place, **error_envelope(late), **named}
    answer = msgspec.json.decode(item.answer, type=_Answer)
    errors = {} if answer.success else {"errors": answer.errors}
    return {
        "id": item.place, "result": answer.result, "success": answer.success, **errors, **named
    }  # fmt: skip
