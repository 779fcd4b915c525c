"""Request logs: one row for each request of somebody whose key was good, to be searched later.

Written behind the requests, so a process that is killed loses those of its last moments: for what
must be right there is the ledger. Bodies are kept only where a request asks for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import msgspec
from msgspec import Struct

from edge.metrics import Record
from edge.store import Db, Store, StoreAway

MOST_PENDING = 10_000  # rows kept in memory while the store is away; then the oldest are lost
MOST_WITH_BODIES = 500  # of those: each may be 200 kB
MOST_ROWS = 1_000_000
FLUSH_S = 0.2
_BATCH = 500
_CLOSE_S = 1.0
_MOST_DETAIL_CHARS = 1000


class LogRow(Struct, frozen=True, kw_only=True):
    """A row, in the order of its columns."""

    id: str
    account: str
    key_id: str
    route: str
    model: str
    status: int
    outcome: str
    detail: str
    region: str
    stream: bool
    cached: bool
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    started: float
    latency_ms: float
    ttft_ms: float | None
    metadata: str  # JSON
    request: bytes | None = None
    response: bytes | None = None


_COLUMNS = ", ".join(LogRow.__struct_fields__)
_LISTED = LogRow.__struct_fields__[:-2]  # bodies are shown one by one


class RequestLogs:
    """`clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pending: deque[LogRow] = deque(maxlen=MOST_PENDING)

    def note(self, record: Record, now: float) -> None:
        """A request has ended, at `now` on the monotonic clock. Waits for nothing."""
        if record.account is not None and record.logged:
            took_s = now - record.started
            row = _row(record, started=self._clock() - took_s, took_s=took_s)
            if len(self._pending) >= MOST_WITH_BODIES:
                row = msgspec.structs.replace(row, request=None, response=None)
            self._pending.append(row)

    async def run(self, store: Store) -> None:
        """Write what has come, a few times a second, until cancelled."""
        while True:
            await anyio.sleep(FLUSH_S)
            await self._flush(store)

    async def close(self, store: Store) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_S):
            await self._flush(store)

    async def _flush(self, store: Store) -> None:
        while self._pending:
            rows = [self._pending.popleft() for _ in range(min(_BATCH, len(self._pending)))]
            try:
                await store.write(partial(_add, rows=rows))
            except StoreAway:
                too_many = max(0, len(rows) + len(self._pending) - MOST_PENDING)
                self._pending.extendleft(reversed(rows[too_many:]))
                return


def _row(record: Record, *, started: float, took_s: float) -> LogRow:
    tries, told, first_at = record.tries, record.num_output, record.first_at
    request, response = record.bodies or (None, None)
    return LogRow(
        id=record.request_id,
        account=record.account or "",
        key_id=record.tenant.key_id if record.tenant else "",
        route=record.route,
        model=record.model or "",
        status=record.status,
        outcome=record.outcome,
        detail=(record.detail or "")[:_MOST_DETAIL_CHARS],
        region=record.region or "",
        stream=record.stream,
        cached=record.cached,
        prompt_tokens=tries.num_prompt,
        completion_tokens=tries.num_output if told is None else told,
        cached_tokens=tries.cached_tokens,
        started=started,
        latency_ms=round(1000 * took_s, 1),
        ttft_ms=None if first_at is None else round(1000 * (first_at - record.started), 1),
        metadata=msgspec.json.encode(record.metadata).decode(),
        request=request,
        response=None if response is None else bytes(response),
    )


def _add(db: Db, rows: Sequence[LogRow]) -> None:
    marks = ", ".join("?" * len(LogRow.__struct_fields__))
    db.executemany(
        f"INSERT INTO logs ({_COLUMNS}) VALUES ({marks}) ON CONFLICT (id) DO NOTHING",
        map(msgspec.structs.astuple, rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Which rows of an account; None: any. Times are Unix seconds, `until` not included."""

    account: str
    text: str | None = None  # in id, model, outcome, detail or metadata
    model: str | None = None
    status: int | None = None
    since: float | None = None
    until: float | None = None

    def where(self) -> tuple[str, list[Any]]:
        """A condition, and what its marks stand for."""
        equal = {"account": self.account, "model": self.model, "status": self.status}
        asked: dict[str, Any] = {f"{name} = ?": value for name, value in equal.items()}
        asked |= {"started >= ?": self.since, "started < ?": self.until}
        given = {condition: value for condition, value in asked.items() if value is not None}
        if self.text is not None:
            # LIKE would take a time that grows as the square of the text.
            fields = "id || ' ' || model || ' ' || outcome || ' ' || detail || ' ' || metadata"
            given[f"instr(lower({fields}), ?) > 0"] = self.text.lower()
        return " AND ".join(given), list(given.values())


def search(db: Db, wanted: Search, *, skip: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """How many rows there are in all, and these of them, newest first."""
    where, values = wanted.where()
    total = db.execute(f"SELECT count(*) FROM logs WHERE {where}", values).fetchone()[0]
    rows = db.execute(
        f"SELECT {', '.join(_LISTED)} FROM logs WHERE {where}"
        f" ORDER BY started DESC, id LIMIT {limit:d} OFFSET {skip:d}",
        values,
    )
    return total, [dict(zip(_LISTED, row, strict=True)) for row in rows]


def find(db: Db, account: str, log: str) -> dict[str, Any] | None:
    query = f"SELECT {_COLUMNS} FROM logs WHERE account = ? AND id = ?"
    row = db.execute(query, (account, log)).fetchone()
    return None if row is None else dict(zip(LogRow.__struct_fields__, row, strict=True))


def prune(db: Db, now: float, limit: int, *, log_s: float, most_rows: int = MOST_ROWS) -> int:
    """Drop the oldest: those that are older than that, or that are too many; how many."""
    over = db.execute("SELECT count(*) FROM logs").fetchone()[0] - most_rows
    query = "SELECT id FROM logs WHERE started < ? ORDER BY started LIMIT ?"
    gone = db.execute(query, (now - log_s, limit)).fetchall()
    if not gone and over > 0:
        query = "SELECT id FROM logs ORDER BY started LIMIT ?"
        gone = db.execute(query, (min(over, limit),)).fetchall()
    db.executemany("DELETE FROM logs WHERE id = ?", gone)
    return len(gone)
