"""Rows in SQLite files: written by a thread of their own, in batches, by many processes at once.

A file is in WAL mode: readers do not wait, and what was written outlives the process, however that
ends. Not for file systems of a network, where WAL does not work. Knows no row's meaning.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic

import msgspec

from routing.usage import Row, Table

logger = logging.getLogger(__name__)

VERSION = 1  # of the tables; in SQLite's user_version
BUSY_S = 5.0  # what one writer waits for another
BATCH = 1000  # rows of one transaction
MOST_PENDING = 100_000  # rows kept in memory while the file cannot be written; then they are lost
RETRY_S = 1.0
CLOSE_S = 1.5  # a process that stops has 4.5 s for everything


class WrongFile(ValueError):
    """A file that holds something else."""


CANNOT = (sqlite3.Error, OSError, WrongFile)  # what opening, reading and writing a file may raise


@contextmanager
def connected(path: Path, table: Table[Row]) -> Generator[sqlite3.Connection, None, None]:
    """The file, made if need be, for its owner alone. Raises CANNOT."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
        _make(connection, path, table)
        use_wal(connection)
        yield connection


def _make(connection: sqlite3.Connection, path: Path, table: Table[Row]) -> None:
    try:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in {0, VERSION}:
            raise WrongFile(f"{path}: version {version}, where {VERSION} is known here")
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        tables = [row[0] for row in connection.execute(query)]
        if not tables:
            for statement in (table.schema, *table.keys, f"PRAGMA user_version = {VERSION}"):
                connection.execute(statement)
        elif tables != [table.name]:  # a journal taken for a ledger, or somebody else's file
            raise WrongFile(f"{path}: no {table.name}, but tables {', '.join(sorted(tables))}")
        connection.execute("COMMIT")
        found = [row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")]
        if tuple(found) != table.columns:
            raise WrongFile(f"{path}: has columns {found}")
    except sqlite3.DatabaseError as exc:
        if isinstance(exc, sqlite3.OperationalError):  # locked, full, unreadable: may pass
            raise
        raise WrongFile(f"{path}: {exc}") from exc


def use_wal(connection: sqlite3.Connection) -> None:
    """Have the file of this connection written ahead, so that readers do not wait for writers.

    Raises sqlite3.OperationalError if others do not let it.
    """
    deadline = time.monotonic() + BUSY_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:  # another is at it: a change of mode waits for nobody
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    # Each commit reaches the kernel, so a killed process loses none; a machine without power may
    # lose the last ones, never the file.
    connection.execute("PRAGMA synchronous = NORMAL")


def write(connection: sqlite3.Connection, table: Table[Row], rows: Iterable[Row]) -> int:
    """Insert these in one transaction; how many of them changed something."""
    before = connection.total_changes
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(table.insert, map(msgspec.structs.astuple, rows))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return connection.total_changes - before


def by_request(connection: sqlite3.Connection, table: Table[Row]) -> Iterator[Row]:
    """Every row, in the order of request ids."""
    query = f"SELECT {', '.join(table.columns)} FROM {table.name} ORDER BY request_id"
    for values in connection.execute(query):
        yield table.read(values)


class RowWriter(Generic[Row]):
    """Writes rows behind whoever has them, each batch as soon as the last one is written.

    `tend` is called with the connection at first, and then between batches every `tend_s` seconds.
    """

    def __init__(
        self,
        path: Path,
        table: Table[Row],
        *,
        tend: Callable[[sqlite3.Connection], None] = lambda connection: None,
        tend_s: float = 600.0,
    ) -> None:
        """Makes the file, so what is wrong with it is told now; but not that another process keeps
        it locked, as one does that was stopped in the middle of a write: that passes."""
        try:
            with connected(path, table) as connection:
                tend(connection)
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        self._path = path
        self._table: Table[Row] = table
        self._tend = tend
        self._tend_s = tend_s
        self._tend_at = time.monotonic() + tend_s
        self._pending: deque[Row] = deque()
        self._taken: list[Row] = []  # the batch that is being written
        self._news = threading.Condition()  # guards what follows and precedes
        self._closing = False
        self._ended = False
        self.num_lost = 0
        self._thread = threading.Thread(target=self._run, name=f"{table.name} writer", daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Rows that are not in the file yet."""
        with self._news:
            return len(self._pending) + len(self._taken)

    def put(self, row: Row) -> None:
        """Have it written soon; after `close`, at once."""
        with self._news:
            if not self._ended:
                if len(self._pending) >= MOST_PENDING:
                    self._pending.popleft()
                    self.num_lost += 1
                self._pending.append(row)
                self._news.notify()
                return
        try:
            with connected(self._path, self._table) as connection:
                write(connection, self._table, [row])
        except CANNOT as exc:
            self.num_lost += 1
            self._complain(str(exc))

    def close(self) -> None:
        """Write what there is; returns when that is done, or cannot be in a short time."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(CLOSE_S)
        if self.num_pending:
            self._complain("the process stops")

    def _run(self) -> None:
        while not self._ended:
            try:
                with connected(self._path, self._table) as connection:
                    self._write_all(connection)
            except CANNOT as exc:
                self._complain(str(exc))
                with self._news:
                    self._pending.extendleft(reversed(self._taken))
                    self._taken = []
                    self._ended = self._closing
                    self._news.wait_for(lambda: self._closing, RETRY_S)

    def _write_all(self, connection: sqlite3.Connection) -> None:
        """Until there are no more rows, and there will be none."""
        while self._take():
            if self._taken:
                write(connection, self._table, self._taken)
                self._taken = []
            if time.monotonic() >= self._tend_at:
                self._tend_at = time.monotonic() + self._tend_s
                self._tend(connection)

    def _take(self) -> bool:
        """The next batch, as soon as there is one; an empty one when it is time to tend. False at
        the end."""
        with self._news:
            wait_s = max(0.0, self._tend_at - time.monotonic())
            self._news.wait_for(lambda: self._pending or self._closing, wait_s)
            count = min(BATCH, len(self._pending))
            self._taken = [self._pending.popleft() for _ in range(count)]
            self._ended = self._closing and not self._taken
            return not self._ended

    def _complain(self, reason: str) -> None:
        fields = {
            "file": str(self._path),
            "reason": reason,
            "waiting": self.num_pending,
            "lost": self.num_lost,
        }
        logger.error("usage was not written", extra={"fields": fields})
