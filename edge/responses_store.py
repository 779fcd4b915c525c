"""Responses that were asked to be stored: what `previous_response_id` and references go back to.

One SQLite file in WAL mode, for all edges of a host. An account sees its own alone. What was not
used for a month is gone, and so are the oldest of an account that has stored too many or too much.
Knows no HTTP, and of a response only its id and the one before it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from msgspec import Struct

from routing.rows import use_wal

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    account TEXT NOT NULL,
    id TEXT NOT NULL,
    previous TEXT,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (account, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_used ON responses (account, used);
"""
_CHAIN = """
WITH RECURSIVE chain (id, previous, data, depth) AS (
    SELECT id, previous, data, 1 FROM responses WHERE account = :account AND id = :id
    UNION ALL
    SELECT earlier.id, earlier.previous, earlier.data, depth + 1
    FROM responses AS earlier JOIN chain ON earlier.id = chain.previous
    WHERE earlier.account = :account AND depth < :most
)
SELECT id, previous, data FROM chain ORDER BY depth DESC
"""
_OVER = """
DELETE FROM responses WHERE account = :account AND id IN (
    SELECT id FROM (
        SELECT id, row_number() OVER newest AS number, sum(size) OVER newest AS bytes
        FROM responses WHERE account = :account
        WINDOW newest AS (ORDER BY used DESC, id)
    ) WHERE number > :most OR bytes > :most_bytes
)
"""
_BUSY_S = 5.0  # what one writer waits for another
_THREADS = 2
MOST_TURNS = 1000  # of one conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of what is kept. Overstepped by `each` at most in every process."""

    days: float = 30.0  # since its last use
    most: int = 10_000  # of an account
    most_bytes: int = 256 * 2**20  # of an account
    each: int = 100  # responses stored between looks


class Stored(Struct, frozen=True, kw_only=True):
    id: str
    previous: str | None
    response: dict[str, Any]  # as its client was told
    input: list[dict[str, Any]]  # its own items, earlier ones not among them


class ResponsesStore:
    """`clock` gives Unix seconds. Calls may come from any task; the work is done in threads."""

    def __init__(
        self, path: Path | None, clock: Callable[[], float], bounds: Bounds | None = None
    ) -> None:
        """Without a path it is kept in memory. OSError or sqlite3.Error if it cannot be used."""
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._clock = clock
        self._bounds = bounds or Bounds()
        self._limiter = CapacityLimiter(_THREADS)
        self._lock = threading.Lock()  # guards the connection
        self._num_put = 0
        self._connection = sqlite3.connect(
            path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        if path is not None:
            use_wal(self._connection)
        self._connection.executescript(_SCHEMA)

    async def put(self, account: str, stored: Stored) -> None:
        """Any process finds it once this returns."""
        await to_thread.run_sync(self._put, account, stored, limiter=self._limiter)

    async def get(self, account: str, response_id: str) -> Stored | None:
        return await to_thread.run_sync(self._get, account, response_id, limiter=self._limiter)

    async def chain(self, account: str, response_id: str) -> list[Stored] | None:
        """The conversation up to this response, oldest first; None when not all of it is there."""
        return await to_thread.run_sync(self._chain, account, response_id, limiter=self._limiter)

    async def delete(self, account: str, response_id: str) -> bool:
        """Whether it was there."""
        return await to_thread.run_sync(self._delete, account, response_id, limiter=self._limiter)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _put(self, account: str, stored: Stored) -> None:
        data = msgspec.msgpack.encode(stored)
        row = (account, stored.id, stored.previous, self._clock(), len(data), data)
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            self._num_put += 1
            if self._num_put % self._bounds.each == 0:
                self._tend(connection, account)

    def _tend(self, connection: sqlite3.Connection, account: str) -> None:
        bounds = self._bounds
        oldest = self._clock() - bounds.days * 86400
        connection.execute("DELETE FROM responses WHERE used < ?", (oldest,))
        limits = {"account": account, "most": bounds.most, "most_bytes": bounds.most_bytes}
        connection.execute(_OVER, limits)

    def _get(self, account: str, response_id: str) -> Stored | None:
        query = "SELECT data FROM responses WHERE account = ? AND id = ?"
        with self._lock:
            row = self._connection.execute(query, (account, response_id)).fetchone()
        return None if row is None else _decoded(row[0])

    def _chain(self, account: str, response_id: str) -> list[Stored] | None:
        names = {"account": account, "id": response_id, "most": MOST_TURNS}
        with self._transaction() as connection:
            rows = connection.execute(_CHAIN, names).fetchall()
            if not rows or rows[0][1] is not None:  # the first turn goes back to another
                return None
            used = [(self._clock(), account, row[0]) for row in rows]
            touch = "UPDATE responses SET used = ? WHERE account = ? AND id = ?"
            connection.executemany(touch, used)
        return [_decoded(row[2]) for row in rows]

    def _delete(self, account: str, response_id: str) -> bool:
        query = "DELETE FROM responses WHERE account = ? AND id = ?"
        with self._lock:
            return self._connection.execute(query, (account, response_id)).rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise


def _decoded(data: bytes) -> Stored:
    return msgspec.msgpack.decode(data, type=Stored)
