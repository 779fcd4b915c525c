"""What the routes share that stand on the store: who asks, whole bodies, JSON answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from edge.auth import Tenant, Verifier
from edge.checks import BadField, required
from edge.clients import read_body
from edge.door import record_of
from edge.response import JSON
from edge.run import authorization
from edge.settings import Settings
from edge.store import Store
from routing.drain import Drain
from routing.errors import Code, Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The same for all of them. `clock` gives Unix seconds."""

    store: Store
    settings: Settings
    verifier: Verifier
    drain: Drain
    clock: Callable[[], float]

    def tenant(self, scope: Scope, headers: Headers, route: str) -> Tenant:
        """Who asks, as the log then has it. Raises Failure(UNAUTHENTICATED)."""
        record = record_of(scope)
        record.route = route
        account = scope["path_params"].get("account_id")  # none: whose the key is
        tenant = self.verifier.tenant(authorization(headers), account)
        record.account = tenant.account
        return tenant

    async def body(self, request: Request) -> bytes:
        with self.drain.until_cut():
            return await read_body(
                request.scope,
                request.receive,
                limit_bytes=self.settings.body_limit_bytes,
                stalled_s=self.settings.stalled_reader_s,
            )


def told(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)


def no_such(kind: str, name: str) -> Failure:
    """The same whether nobody has it, or another account."""
    return Failure(Code.NOT_FOUND, f"No such {kind}: {name[:80]!r}")


def whole_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A query parameter in [low, high]."""
    text = request.query_params.get(name)
    if text is None:
        return default
    digits = text.removeprefix("-")
    value = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else None
    if value is None or not low <= value <= high:
        raise BadField(f"/{name}", f"'/{name}' must be a whole number from {low} to {high}")
    return value


def needed(text: str | None, name: str) -> str:
    if not text:
        raise BadField(f"/{name}", required("", name))
    return text
