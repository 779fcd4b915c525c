"""What a request may ask for by headers, beside an answer: to be asked once, to be answered from
the cache, to be found in the logs. One that asks for none of it passes as if this was not here.

The headers are those of Cloudflare's AI Gateway, and `Idempotency-Key`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.checks import BadField
from edge.door import record_of
from edge.inside import asks_inside
from edge.queued import Queue, is_queued
from edge.replies import Replies, Slot
from edge.store_routes import Ground

KEY = "idempotency-key"
MOST_KEY_CHARS = 255
MOST_METADATA = 5
MOST_METADATA_CHARS = 1000
_CACHE_S = 300.0  # where only a cache key is named
MOST_CACHE_S = 2_592_000
_MOST_BODY_BYTES = 100_000  # of a request and of an answer, that logs keep
_INLINE_BYTES = 100_000  # about 1 ms to parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What the headers of one request ask for."""

    key: str | None = None
    cache_s: float | None = None
    cache_key: str | None = None
    logged: bool = True
    bodies: bool = False
    metadata: Mapping[str, str | float | bool]

    @property
    def nothing(self) -> bool:
        """Whether the request can pass as it comes."""
        return self.key is None and self.cache_s is None and not self.bodies


class Gateway:
    """An ASGI endpoint around another; `queue` takes the requests that are to be queued."""

    def __init__(
        self, endpoint: ASGIApp, route: str, ground: Ground, replies: Replies, queue: Queue | None
    ) -> None:
        self._endpoint = endpoint
        self._route = route
        self._ground = ground
        self._replies = replies
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        record.logged = True
        if asks_inside(scope) is not None:
            await self._endpoint(scope, receive, send)
            return
        wants = wanted(Headers(scope=scope))
        record.logged, record.metadata = wants.logged, dict(wants.metadata)
        queue = self._queue if self._queue is not None and is_queued(scope) else None
        if wants.nothing:
            await (queue or self._endpoint)(scope, receive, send)
        else:
            await self._serve(queue, wants, scope, receive, send)

    async def _serve(
        self, queue: Queue | None, wants: Wants, scope: Scope, receive: Receive, send: Send
    ) -> None:
        request, record = Request(scope, receive), record_of(scope)
        tenant = self._ground.tenant(scope, request.headers, self._route)
        record.tenant = tenant
        body = await self._ground.body(request)
        if wants.bodies:
            record.bodies = (body[:_MOST_BODY_BYTES], bytearray())
            send = _heard(send, record.bodies[1])
        serve = _with_body(queue or self._endpoint, body)
        if wants.cache_s is not None and queue is None:
            name = await _cache_name(scope["path"], wants.cache_key, body)
            if name is not None:
                slot = Slot(kind="cache", account=tenant.account, name=name, digest="")
                serve = self._replies.cached(serve, slot, wants.cache_s)
        if wants.key is not None:
            asked = sha256(b"\0".join([scope["path"].encode(), scope["query_string"], body]))
            slot = Slot(
                kind="key", account=tenant.account, name=wants.key, digest=asked.hexdigest()
            )
            serve = self._replies.once(serve, slot)
        # Of a copy of the scope the connection knows nothing: all of the answer passes `send`.
        await serve(dict(scope), receive, send)


def wanted(headers: Headers) -> Wants:
    """What the headers say; raises BadField naming the one that is wrong."""
    ttl = _number(headers, "cf-aig-cache-ttl")
    cache_key = headers.get("cf-aig-cache-key")
    cache_s = _CACHE_S if ttl is None and cache_key is not None else ttl
    if _flag(headers, "cf-aig-skip-cache"):
        cache_s = None
    logs, bodies = (
        _flag(headers, "cf-aig-collect-log"),
        _flag(headers, "cf-aig-collect-log-payload"),
    )
    return Wants(
        key=_key(headers.get(KEY)),
        cache_s=cache_s,
        cache_key=cache_key,
        logged=logs is not False,
        bodies=logs is not False and (bodies if bodies is not None else logs is True),
        metadata=_metadata(headers.get("cf-aig-metadata")),
    )


def _key(key: str | None) -> str | None:
    if key is not None and not (0 < len(key) <= MOST_KEY_CHARS and key.isprintable()):
        raise _bad(KEY, f"1 to {MOST_KEY_CHARS} printable characters")
    return key


def _flag(headers: Headers, name: str) -> bool | None:
    text = headers.get(name)
    if text is None:
        return None
    if text.lower() not in {"true", "false"}:
        raise _bad(name, "true or false")
    return text.lower() == "true"


def _number(headers: Headers, name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    good = text.isascii() and text.isdecimal() and len(text) < 10
    if not good or not 1 <= int(text) <= MOST_CACHE_S:
        raise _bad(name, f"whole seconds from 1 to {MOST_CACHE_S}")
    return float(text)


def _metadata(text: str | None) -> dict[str, str | float | bool]:
    if text is None:
        return {}
    says = f"a JSON object of at most {MOST_METADATA} strings, numbers and booleans"
    try:
        if len(text) > MOST_METADATA_CHARS:
            raise _bad("cf-aig-metadata", f"at most {MOST_METADATA_CHARS} characters")
        found = msgspec.json.decode(text, type=dict[str, str | float | bool])
    except (ValueError, RecursionError):
        raise _bad("cf-aig-metadata", says) from None
    if len(found) > MOST_METADATA:
        raise _bad("cf-aig-metadata", says)
    return found


def _bad(header: str, wants: str) -> BadField:
    return BadField("", f"the header '{header}' must be {wants}")


async def _cache_name(path: str, key: str | None, body: bytes) -> str | None:
    """Equal for requests that mean the same; None for a body that will be refused."""
    if len(body) <= _INLINE_BYTES:
        return _named(path, key, body)
    return await to_thread.run_sync(_named, path, key, body)


def _named(path: str, key: str | None, body: bytes) -> str | None:
    try:
        asked: Any = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    # Under a key of the client's own, still no stream for one who asks for none.
    meant = asked if key is None else [key, asked.get("stream") is True]
    return sha256(path.encode() + b"\0" + msgspec.json.encode(meant, order="sorted")).hexdigest()


def _with_body(endpoint: ASGIApp, body: bytes) -> ASGIApp:
    """The endpoint for a request whose body was read already."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        unread = [body]

        async def receive_again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await endpoint(scope, receive_again, send)

    return serve


def _heard(send: Send, into: bytearray) -> Send:
    async def send_heard(message: Message) -> None:
        if message["type"] == "http.response.body":
            into.extend(message.get("body", b"")[: _MOST_BODY_BYTES - len(into)])
        await send(message)

    return send_heard
