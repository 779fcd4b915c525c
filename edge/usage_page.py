"""`GET /client/v4/accounts/{account_id}/ai/usage`: what an account used, from the ledgers here.

    from, to    dates (the day of `to` is in) or times with an offset; the last 30 days
    model       that one only
    group_by    day, model or key
    page, per_page

Prices are those of today's rows, whenever the tokens were used. Reads files in a thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import quote

import msgspec
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from edge.auth import Verifier
from edge.checks import BadField
from edge.door import record_of
from edge.envelope import envelope
from edge.prices import USD_A_NEURON, Prices
from edge.response import JSON
from routing.errors import Code, Failure

Group = Literal["day", "model", "key"]
DAYS = 30  # where no beginning is named
MOST_PER_PAGE = 1000
_PER_PAGE = 100
_MOST_CHARS = 200
_READERS = 2
_COLUMNS = {"day": "date(ended, 'unixepoch')", "model": "model", "key": "key_id"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked. Times are Unix seconds."""

    begin: float
    end: float  # not in it
    model: str | None
    group: Group
    page: int
    per_page: int


@dataclass(slots=True)
class Sum:
    """What one group used."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    neurons: float = 0.0

    def told(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "neurons": round(self.neurons, 6),
            "usd": round(self.neurons * USD_A_NEURON, 9),
        }


@dataclass(slots=True)
class Sums:
    """Of every group, in the order of their names."""

    prices: Prices
    groups: dict[str, Sum] = field(default_factory=dict)
    total: Sum = field(default_factory=Sum)

    def add(self, name: str, model: str, counts: tuple[int, int, int, int]) -> None:
        requests, prompt, cached, completion = counts
        neurons = self.prices.neurons(model, prompt=prompt, cached=cached, completion=completion)
        for it in (self.groups.setdefault(name, Sum()), self.total):
            it.requests += requests
            it.prompt_tokens += prompt
            it.cached_tokens += cached
            it.completion_tokens += completion
            it.neurons += neurons


class UsagePage:
    """`ledger` is this edge's; those beside it, of other edges, count as well."""

    def __init__(
        self,
        verifier: Verifier,
        ledger: Path | None,
        prices: Prices,
        clock: Callable[[], float],
    ) -> None:
        self._verifier = verifier
        self._ledger = ledger
        self._prices = prices
        self._clock = clock
        self._readers = CapacityLimiter(_READERS)

    async def get(self, request: Request) -> Response:
        record, account = record_of(request.scope), request.path_params["account_id"]
        record.route = "usage"
        self._verifier.tenant(request.headers.get("authorization"), account)
        record.account = account
        query = parse(request.query_params, self._clock())
        sums = await to_thread.run_sync(self._read, account, query, limiter=self._readers)
        return Response(msgspec.json.encode(_told(sums, query)), media_type=JSON)

    def _read(self, account: str, query: Query) -> Sums:
        if self._ledger is None:
            raise Failure(Code.UNAVAILABLE, "usage is not kept here")
        try:
            return summed(self._ledger.parent.glob("ledger*.sqlite"), account, query, self._prices)
        except sqlite3.Error:
            raise Failure(Code.UNAVAILABLE, "usage cannot be read now") from None


def summed(ledgers: Iterable[Path], account: str, query: Query, prices: Prices) -> Sums:
    """What `account` used, by all these ledgers. Raises sqlite3.Error."""
    column = _COLUMNS[query.group]
    words = f"""
        SELECT {column}, model, count(*), sum(prompt_tokens),
               sum(min(cached_tokens, prompt_tokens)), sum(completion_tokens)
        FROM ledger WHERE account = ? AND ended >= ? AND ended < ? {{}} GROUP BY 1, 2"""
    values: list[object] = [account, query.begin, query.end]
    if query.model is not None:
        values.append(query.model)
    sql = words.format("" if query.model is None else "AND model = ?")
    sums = Sums(prices)
    for path in sorted(ledgers):
        url = f"file:{quote(str(path))}?mode=rw"  # ro could not read it without its writer
        with closing(sqlite3.connect(url, uri=True)) as connection:
            connection.execute("PRAGMA query_only = 1")
            for name, model, *counts in connection.execute(sql, values):
                sums.add(name, model, cast("tuple[int, int, int, int]", tuple(counts)))
    return sums


def parse(asked: Mapping[str, str], now: float) -> Query:
    """The parameters; Failure(BAD_INPUT) names the one that is wrong."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    begin, end = today - timedelta(days=DAYS), today + timedelta(days=1)
    if (text := asked.get("from")) is not None:
        begin, _ = _span("from", text)
    if (text := asked.get("to")) is not None:
        _, end = _span("to", text)
    group = asked.get("group_by", "day")
    if group not in get_args(Group):
        raise BadField("/group_by", f"'/group_by' must be one of {', '.join(get_args(Group))}")
    return Query(
        begin=begin.timestamp(),
        end=end.timestamp(),
        model=asked.get("model"),
        group=cast("Group", group),
        page=_number(asked, "page", 1, most=1_000_000),
        per_page=_number(asked, "per_page", _PER_PAGE, most=MOST_PER_PAGE),
    )


def _span(name: str, text: str) -> tuple[datetime, datetime]:
    """The day, or the moment, that `text` names."""
    try:
        if len(text) == len("2026-11-27"):
            day = date.fromisoformat(text)
            begin = datetime(day.year, day.month, day.day, tzinfo=UTC)
            return begin, begin + timedelta(days=1)
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        moment.timestamp()
    except (ValueError, OverflowError):
        says = f"'/{name}' must be a date, or a time with its offset, got {text[:_MOST_CHARS]!r}"
        raise BadField(f"/{name}", says) from None
    return moment, moment


def _number(asked: Mapping[str, str], name: str, default: int, *, most: int) -> int:
    text = asked.get(name)
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most:
        return int(text)
    raise BadField(f"/{name}", f"'/{name}' must be 1 to {most}, got {text[:_MOST_CHARS]!r}")


def _told(sums: Sums, query: Query) -> dict[str, object]:
    names = sorted(sums.groups)
    first = (query.page - 1) * query.per_page
    rows = [
        {query.group: name, **sums.groups[name].told()}
        for name in names[first : first + query.per_page]
    ]
    info = {
        "page": query.page,
        "per_page": query.per_page,
        "count": len(rows),
        "total_count": len(names),
        "total_pages": -(-len(names) // query.per_page),
        "total": sums.total.told(),
    }
    return envelope(rows) | {"result_info": info}
