"""The file in which responses are stored: SQLite in WAL mode, for all edges of a host.

Each call runs in a thread, in a transaction of its own. Knows no row's meaning.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from anyio import to_thread

from routing.errors import Code, Failure
from routing.rows import use_wal

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_BUSY_S = 5.0  # what one writer waits for another
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, account TEXT NOT NULL, body BLOB NOT NULL,
    created REAL NOT NULL, forget REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_forget ON responses (forget);
CREATE INDEX IF NOT EXISTS responses_account ON responses (account, forget);
"""


class ResponsesFile:
    def __init__(self, path: Path | None) -> None:
        """Without a path it is kept in memory. OSError or sqlite3.Error if it cannot be used."""
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._lock = threading.Lock()  # guards the connection
        self._connection = sqlite3.connect(
            path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        if path is not None:
            use_wal(self._connection)
        self._connection.executescript(_SCHEMA)

    async def read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """What `work` makes of the rows. Failure(UNAVAILABLE) when the file cannot be used now."""
        return await self._call("BEGIN", work)

    async def write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """What `work` returns once all that it changed is kept. Failure(UNAVAILABLE) likewise."""
        return await self._call("BEGIN IMMEDIATE", work)

    async def _call(self, begin: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            return await to_thread.run_sync(self._within, begin, work)
        except sqlite3.Error as exc:
            logger.error("responses cannot be reached", extra={"fields": {"reason": str(exc)}})
            says = "what is stored cannot be reached right now, please try again"
            raise Failure(Code.UNAVAILABLE, says) from exc

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _within(self, begin: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._lock:
            self._connection.execute(begin)
            try:
                made = work(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            return made
