"""Requests that an edge makes to itself, for somebody whose key it has checked before.

They take the way that a client's take: the same checks, walk, usage and log. Only that nobody's
connection is behind them, so that they go last where there is little room. Knows no route.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import anyio
from starlette.types import ASGIApp, Message, Scope

from edge.auth import Tenant
from routing.abort import EXTENSION

PRIORITY = -1  # below what clients wait for (wire.Generate.priority)
NO_ROOM = frozenset({429, 503})  # HTTP: who is answered so comes again, and counts once
_STATE = "inside"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def retry_after_s(self) -> float | None:
        said = self.headers.get("retry-after", "")
        return float(said) if said.isdecimal() else None


@dataclass(slots=True)
class _Heard:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


def asks_inside(scope: Scope) -> Tenant | None:
    """For whom, where the edge itself asks. No client can make its request look like this."""
    return cast("Tenant | None", scope["state"].get(_STATE))


async def ask(app: ASGIApp, tenant: Tenant, route: str, body: bytes) -> Answered:
    """POST `body` to `route`, below /client/v4/accounts/{account}/ai/."""
    path = f"/client/v4/accounts/{tenant.account}/ai/{route}"
    heard = _Heard()
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await anyio.sleep_forever()
        raise AssertionError  # nobody hangs up

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            heard.status = message["status"]
            pairs = message["headers"]
            heard.headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in pairs
            }
        else:
            heard.body += message.get("body", b"")

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {_STATE: tenant},
        "extensions": {EXTENSION: {"abort": lambda: None, "write": lambda scope, data: False}},
    }
    await app(scope, receive, send)
    return Answered(status=heard.status, headers=heard.headers, body=bytes(heard.body))
