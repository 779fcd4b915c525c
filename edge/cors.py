"""Web pages of other origins may ask: preflight answers, and headers that let them read answers.

Keys are bearer keys, which no browser sends by itself, so any origin may ask by default: a page
must have been given a key. Cookies are never involved, so credentials are not allowed. Pure ASGI.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
# Not for pages: what operators and other processes read.
OPERATORS = frozenset({"/health", "/ready", "/metrics", "/v1/report"})
EXPOSED = ", ".join(
    (
        *("x-served-by", "cf-ai-req-id", "x-request-id", "retry-after", "x-should-retry"),
        *("cf-aig-step", "cf-aig-model", "cf-aig-cache-status", "cf-aig-log-id"),
        *(
            f"x-ratelimit-{what}-{kind}"
            for kind in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        ),
    )
)
_METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
_ASKED = "authorization, content-type"  # where a preflight names no headers
_MAX_AGE_S = 7200  # Chrome keeps none for longer
_MOST_NAMED = 4096  # characters of headers that a preflight names


class Cors:
    """ASGI middleware, outside of all that could refuse a request."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is None or not self._origins or scope["path"] in OPERATORS:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(origin)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers, allowed, send)
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                marked = MutableHeaders(scope=message)
                for name, value in allowed.items():
                    marked[name] = value
                marked["access-control-expose-headers"] = EXPOSED
                if ANY not in self._origins:
                    marked.add_vary_header("origin")
            await send(message)

        await self._app(scope, receive, send_marked)

    def _allowed(self, origin: str) -> dict[str, str]:
        if ANY in self._origins:
            return {"access-control-allow-origin": ANY}
        return {"access-control-allow-origin": origin} if origin in self._origins else {}


async def _preflight(headers: Headers, allowed: dict[str, str], send: Send) -> None:
    """204, with what may be asked; to an origin that may not, without."""
    told = MutableHeaders({"vary": "origin, access-control-request-headers", **allowed})
    if allowed:
        # Named one by one: * does not stand for Authorization.
        named = headers.get("access-control-request-headers", _ASKED)
        told["access-control-allow-methods"] = _METHODS
        told["access-control-allow-headers"] = named[:_MOST_NAMED]
        told["access-control-max-age"] = str(_MAX_AGE_S)
    await send({"type": "http.response.start", "status": 204, "headers": told.raw})
    await send({"type": "http.response.body", "body": b""})
