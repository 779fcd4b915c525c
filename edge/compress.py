"""Whole answers of over a kilobyte go out as gzip where the client takes that; streams never do.

A response is whole when it states its length and its body is one message. Everything else passes
as it comes: a compressor in a stream would hold back events. Pure ASGI.
"""

from __future__ import annotations

import gzip
import re

from anyio import to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAST_BYTES = 1024
LEVEL = 5
_INLINE_BYTES = 100_000  # about 2 ms; more is for a thread
_TYPES = ("application/json", "text/")
_GZIP = re.compile(r"(?:^|,)\s*(?:x-)?gzip\s*(?:;\s*q=(?P<q>[\d.]+)\s*)?(?=,|$)", re.IGNORECASE)


class Gzip:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = _takes_gzip(Headers(scope=scope).get("accept-encoding", ""))
        held: Message | None = None  # the start of an answer that may become gzip

        async def send_less(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _is_whole(message):
                MutableHeaders(scope=message).add_vary_header("accept-encoding")
                if taken:
                    held = message
                    return
            elif held is not None:
                start, held = held, None
                if not message.get("more_body", False):
                    message = await _compressed(start, message)
                await send(start)
            await send(message)

        await self._app(scope, receive, send_less)


def _takes_gzip(accepted: str) -> bool:
    found = _GZIP.search(accepted)
    if found is None:
        return False
    try:
        return found["q"] is None or float(found["q"]) > 0
    except ValueError:
        return False


def _is_whole(start: Message) -> bool:
    headers = Headers(scope=start)
    length, kind = headers.get("content-length", ""), headers.get("content-type", "")
    return (
        length.isdecimal()
        and int(length) >= LEAST_BYTES
        and kind.startswith(_TYPES)
        and "content-encoding" not in headers
    )


async def _compressed(start: Message, message: Message) -> Message:
    """The body as gzip; `start` says so, and its new length."""
    body = message.get("body", b"")
    if len(body) <= _INLINE_BYTES:
        small = _gzip(body)
    else:
        small = await to_thread.run_sync(_gzip, body)
    headers = MutableHeaders(scope=start)
    headers["content-encoding"] = "gzip"
    headers["content-length"] = str(len(small))
    return {**message, "body": small}


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, LEVEL, mtime=0)
