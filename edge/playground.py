"""A page to try everything by, served by the edge itself; it asks what any client may ask.

Its files lie in `static`, and nothing is fetched from elsewhere: the policy in the headers says so
to the browser.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.door import record_of
from routing.choose import STALE_S, Known
from routing.health import State

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    return [_file(path, *file) for path, file in _FILES.items()]


def _file(path: str, name: str, kind: str) -> Route:
    content = (files("edge") / "static" / name).read_bytes()

    async def give(request: Request) -> Response:
        record_of(request.scope).route = "playground"
        return Response(content, headers=_HEADERS | {"content-type": kind})

    return Route(path, give, methods=["GET"])


def regions(known: list[Known], now: float) -> list[dict[str, Any]]:
    """Each region as this edge sees it, for the table and the map."""
    return [_region(it, now) for it in known]


def _region(known: Known, now: float) -> dict[str, Any]:
    report = known.report
    return {
        "name": known.region.name,
        "latitude": known.region.place.latitude,
        "longitude": known.region.place.longitude,
        "state": _state(known, now),
        "rtt_ms": known.rtt_ms,
        "room": report.room if report else 0,
        "models": sorted(model.model for model in report.models) if report else [],
        "loading": list(report.loading) if report else [],
        "processes": len(report.processes) if report else 0,
        "in_flight": sum(process.in_flight for process in report.processes) if report else 0,
    }


def _state(known: Known, now: float) -> str:
    """In one word: what would keep a request from it."""
    if not known.connected or known.report is None or now - known.reported_at > STALE_S:
        return "away"
    if known.breaker.state(now) is State.OPEN:
        return "left alone"
    if known.report.models:
        return "ready" if known.report.room else "full"
    return "loading" if known.report.loading else "empty"
