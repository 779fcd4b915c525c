"""One file of what must outlive a process: jobs, files, replies, logs. Used by all edges of a host.

SQLite in WAL mode, by the standard library's own module: forty statements of SQL that PostgreSQL
takes too need no layer that writes them. Every call runs in a thread, in a transaction of its own,
and is over in seconds, whatever the file or another process does. Knows no table's meaning.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from errno import EACCES
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from edge.store_schema import STATEMENTS, TABLES, VERSION
from routing.errors import Code, Failure
from routing.rows import CANNOT, WrongFile, use_wal

logger = logging.getLogger(__name__)

Db = sqlite3.Connection
T = TypeVar("T")

THREADS = 4
LONG_THREADS = 2  # of what may take long
BUSY_S = 2.0  # what one writer waits for another
CALL_S = 5.0  # of one call, with its wait for a thread
AWAY_S = 1.0  # for so long nobody tries a store that has just failed
_LOOK_STEPS = 20_000  # of SQLite's machine, between looks at the clock: about a millisecond


class StoreAway(Failure):
    """The store cannot be used now. Only what needs it fails."""

    def __init__(self) -> None:
        says = "what is stored cannot be reached right now, please try again"
        super().__init__(Code.UNAVAILABLE, says, retry_after_s=AWAY_S)


class Store:
    """The file at `path`, made if need be. What is wrong with it is told now: CANNOT.

    That another process keeps it locked is not: that passes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limiters: dict[bool, CapacityLimiter] = {}  # by whether a call may take long
        self._turns: dict[str, CapacityLimiter] = {}  # of accounts that look through much now
        self._making = threading.Lock()
        self._idle: list[tuple[Db, int]] = []  # with the inode of its file
        self._away_until = float("-inf")
        self.calls: Counter[str] = Counter()  # ended, by how: ok, refused, away, left
        self.busy_s = 0.0  # that they took together, with their waits
        try:
            self._idle.append(self._open())
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise WrongFile(f"{path}: {exc}") from exc

    async def read(self, work: Callable[[Db], T]) -> T:
        """What `work` makes of the store as it is at one moment. Raises StoreAway."""
        return await self._call(partial(self._within, "BEGIN", work))

    async def look_through(self, account: str, work: Callable[[Db], T]) -> T:
        """As `read`, of what may be much: few at once, so that others find a thread, and of each
        account one after the other. That it takes too long is its own fault, and no reason to
        leave the store alone: Failure(TIMEOUT)."""
        return await self._call(partial(self._within, "BEGIN", work), account)

    async def write(self, work: Callable[[Db], T]) -> T:
        """What `work` returns once all that it changed is kept. Raises StoreAway.

        A call that was cancelled or found the store away may have happened all the same.
        """
        return await self._call(partial(self._within, "BEGIN IMMEDIATE", work))

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    async def _call(self, work: Callable[[float], T], looks: str | None = None) -> T:
        """`looks`: the account that looks through much."""
        started, outcome = time.monotonic(), "left"
        try:
            made = await self._try(work, looks)
            outcome = "ok"
        except Failure as failure:  # else: what was asked for is not there, or not allowed
            outcome = "away" if isinstance(failure, StoreAway) else "refused"
            raise
        finally:
            self.calls[outcome] += 1
            self.busy_s += time.monotonic() - started
        return made

    async def _try(self, work: Callable[[float], T], looks: str | None) -> T:
        if time.monotonic() < self._away_until:
            raise StoreAway
        is_long = looks is not None
        if is_long not in self._limiters:  # it belongs to the loop that runs now
            self._limiters[is_long] = CapacityLimiter(LONG_THREADS if is_long else THREADS)
        deadline = time.monotonic() + CALL_S
        try:
            with anyio.fail_after(CALL_S):
                async with self._turn(looks):
                    return await to_thread.run_sync(
                        work, deadline, limiter=self._limiters[is_long], abandon_on_cancel=True
                    )
        except (*CANNOT, TimeoutError) as exc:
            if is_long and _is_late(exc):
                raise Failure(Code.TIMEOUT, "this took too long: ask for less of it") from exc
            self._away_until = time.monotonic() + AWAY_S
            logger.error(
                "the store cannot be used",
                extra={"fields": {"file": str(self._path), "reason": str(exc) or "out of time"}},
            )
            raise StoreAway from exc

    @asynccontextmanager
    async def _turn(self, account: str | None) -> AsyncGenerator[None, None]:
        """A block while which it has no other, where it is an account's."""
        if account is None:
            yield
            return
        turn = self._turns.setdefault(account, CapacityLimiter(1))
        try:
            async with turn:
                yield
        finally:
            if not turn.borrowed_tokens:
                self._turns.pop(account, None)

    def _within(self, begin: str, work: Callable[[Db], T], deadline: float) -> T:
        """Run in a thread. `deadline` ends also a statement that would take too long."""
        with self._borrowed() as db:
            db.set_progress_handler(lambda: time.monotonic() > deadline, _LOOK_STEPS)
            db.execute(begin)
            try:
                made = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            finally:
                db.set_progress_handler(None, 0)
            return made

    @contextmanager
    def _borrowed(self) -> Generator[Db, None, None]:
        taken = self._take()
        try:
            yield taken[0]
        except Failure:  # what the caller is told: nothing is wrong with the connection
            self._idle.append(taken)
            raise
        except BaseException:
            taken[0].close()
            raise
        self._idle.append(taken)

    def _take(self) -> tuple[Db, int]:
        while self._idle:
            taken = self._idle.pop()
            if taken[1] == _inode(self._path):
                return taken
            taken[0].close()  # of a file that is no longer there
        return self._open()

    def _open(self) -> tuple[Db, int]:
        path = self._path
        with self._making:
            if not path.exists():
                # Only then: with any file descriptor of it that is closed, this process loses all
                # of its locks on a file (sqlite.org/howtocorrupt.html, 2.2).
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(EACCES, os.strerror(EACCES), str(path))
        inode = _inode(path)
        db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _make(db, path)
        except BaseException:
            db.close()
            raise
        return db, inode


def _make(db: Db, path: Path) -> None:
    """Have the tables there, and WAL; WrongFile for a file that holds something else."""
    try:
        if _version(db, path) != VERSION:
            db.execute("BEGIN IMMEDIATE")
            if _version(db, path) != VERSION:  # nobody else was faster
                for statement in (*STATEMENTS, f"PRAGMA user_version = {VERSION}"):
                    db.execute(statement)
            db.execute("COMMIT")
        use_wal(db)
    except sqlite3.DatabaseError as exc:
        if isinstance(exc, sqlite3.OperationalError):  # locked, full, unreadable: may pass
            raise
        raise WrongFile(f"{path}: {exc}") from exc


def _version(db: Db, path: Path) -> int:
    """0 for a file with nothing in it."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    tables = {row[0] for row in db.execute(query)}
    if (version, tables) not in ((0, set()), (VERSION, set(TABLES))):
        listed = ", ".join(sorted(tables)) or "none"
        says = f"{path}: is no store of version {VERSION}, but version {version}, tables {listed}"
        raise WrongFile(says)
    return version


def _is_late(exc: Exception) -> bool:
    if isinstance(exc, sqlite3.Error):
        return getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
    return isinstance(exc, TimeoutError)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1
