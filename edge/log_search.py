"""`GET /ai/logs`: an account's request logs, searched, and one of them with its bodies."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.checks import BadField
from edge.envelope import envelope
from edge.request_logs import Search, find, search
from edge.store_routes import Ground, no_such, told, whole_number

_MOST_PER_PAGE = 100
_MOST_PAGES = 100_000


class LogRoutes:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def routes(self, ai: str) -> list[Route]:
        return [
            Route(f"{ai}/logs", self.search, methods=["GET"]),
            Route(f"{ai}/logs/{{log}}", self.show, methods=["GET"]),
        ]

    async def search(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "logs")
        asked = request.query_params
        status = whole_number(request, "status", 0, 100, 599) if "status" in asked else None
        wanted = Search(
            account=tenant.account,
            text=asked.get("search"),
            model=asked.get("model"),
            status=status,
            since=_time(asked.get("from"), "/from"),
            until=_time(asked.get("to"), "/to"),
        )
        page = whole_number(request, "page", 1, 1, _MOST_PAGES)
        per_page = whole_number(request, "per_page", 20, 1, _MOST_PER_PAGE)
        skip = (page - 1) * per_page
        total, rows = await self._ground.store.look_through(
            tenant.account, partial(search, wanted=wanted, skip=skip, limit=per_page)
        )
        info = {
            "page": page,
            "per_page": per_page,
            "count": len(rows),
            "total_count": total,
            "total_pages": -(-total // per_page),
        }
        return told(envelope([_shown(row) for row in rows]) | {"result_info": info})

    async def show(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "logs")
        log = request.path_params["log"]
        row = await self._ground.store.read(partial(find, account=tenant.account, log=log))
        if row is None:
            raise no_such("log", log)
        return told(envelope(_shown(row)))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it."""
    started = datetime.fromtimestamp(row["started"], UTC)
    texts: dict[str, Any] = {
        name: None if row[name] is None else row[name].decode("utf-8", "replace")
        for name in ("request", "response")
        if name in row
    }
    return {
        **{name: value for name, value in row.items() if name not in {"account", "started"}},
        "created_at": started.isoformat(timespec="milliseconds"),
        "success": row["outcome"] == "ok",
        "stream": bool(row["stream"]),
        "cached": bool(row["cached"]),
        "metadata": msgspec.Raw(row["metadata"].encode()),
        **texts,
    }


def _time(text: str | None, pointer: str) -> float | None:
    """Unix seconds, given as such or as ISO 8601; without a zone it is UTC."""
    if text is None:
        return None
    try:
        if text.replace(".", "", 1).isdecimal():
            return float(text)
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        says = f"'{pointer}' must be a time as 2026-01-31T12:00:00Z, or Unix seconds"
        raise BadField(pointer, says) from None
