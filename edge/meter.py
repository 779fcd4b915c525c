"""Counts what limits count, in one SQLite file for all edges of a host: exact, as every count is
looked at and raised in one transaction.

Without its file it counts for this process alone, in memory, until the file is back. It blocks, so
it is called from a thread. Knows no request and no header.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edge.limits import WINDOW_S, Limit, Rule, Standing, period_of
from routing.errors import Code, Failure
from routing.rows import use_wal

logger = logging.getLogger(__name__)

BUSY_S = 1.0  # that a request waits for another process; then it is counted in memory
AGAIN_S = 5.0  # between tries of a file that cannot be used
_LEAP_S = 5.0  # what was counted further ahead than this is of a clock that was set back
_KEPT_S = 40 * 86_400.0  # of amounts: a month, and what may be of interest after it

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS hits (bucket TEXT NOT NULL, at REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS hits_bucket ON hits (bucket, at)",
    "CREATE TABLE IF NOT EXISTS spent (bucket TEXT NOT NULL, begin REAL NOT NULL, "
    "amount REAL NOT NULL, PRIMARY KEY (bucket, begin)) WITHOUT ROWID",
)
# Of an amount: how much was used. Of a limit of requests: when one was counted that counts no more.
Charge = tuple[Rule, float]
Admitted = tuple[tuple[Standing, ...], Failure | None]


class Meter:
    """`clock` gives Unix seconds. For one caller at a time, in whatever thread."""

    def __init__(self, path: Path | None, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._memory = _made(_connect(":memory:"), clock())
        self._file: sqlite3.Connection | None = None
        self._again_at = float("-inf")

    def admit(self, rules: Sequence[Rule], charges: Iterable[Charge] = ()) -> Admitted:
        """Count one request, after `charges`; or say which rule forbids it, and count none."""
        taken = list(charges)
        return self._counted(lambda connection: self._admit(connection, rules, taken))

    def charge(self, charges: Iterable[Charge]) -> None:
        """Count these."""
        taken = list(charges)
        if taken:
            self._counted(lambda connection: self._admit(connection, (), taken))

    def close(self) -> None:
        self._memory.close()
        if self._file is not None:
            self._file.close()

    def _counted(self, count: Callable[[sqlite3.Connection], Admitted]) -> Admitted:
        if self._path is not None and time.monotonic() >= self._again_at:
            try:
                if self._file is None:
                    self._file = _open(self._path, self._clock())
                return count(self._file)
            except (sqlite3.Error, OSError) as exc:
                fields = {"file": str(self._path), "reason": str(exc)}
                logger.error("limits are counted in memory", extra={"fields": fields})
                self._again_at = time.monotonic() + AGAIN_S
                if self._file is not None:
                    self._file.close()
                    self._file = None
        return count(self._memory)

    def _admit(
        self,
        connection: sqlite3.Connection,
        rules: Sequence[Rule],
        charges: Sequence[Charge],
    ) -> Admitted:
        connection.execute("BEGIN IMMEDIATE")
        try:
            now = self._clock()  # in here: the order of times is the order of counting
            for rule, number in charges:
                if rule.limit.is_amount:
                    _spend(connection, rule, number, now)
                else:
                    _give_back(connection, rule, number)
            standings: list[Standing] = []
            failure = None
            for rule in rules:
                look = _amount if rule.limit.is_amount else _window
                standing, failure = look(connection, rule, now)
                standings.append(standing)
                if failure is not None:
                    break
            else:
                hits = [(_bucket(it), now) for it in rules if not it.limit.is_amount]
                connection.executemany("INSERT INTO hits VALUES (?, ?)", hits)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return tuple(standings), failure


def _window(
    connection: sqlite3.Connection, rule: Rule, now: float
) -> tuple[Standing, Failure | None]:
    """How many requests fit into the window that ends now, with one more counted."""
    limit, bucket = rule.limit, _bucket(rule)
    length = WINDOW_S[limit.period]
    connection.execute(
        "DELETE FROM hits WHERE bucket = ? AND (at <= ? OR at > ?)",
        (bucket, now - length, now + _LEAP_S),
    )
    query = "SELECT count(*), max(at) FROM hits WHERE bucket = ?"
    count, last = connection.execute(query, (bucket,)).fetchone()
    if count < limit.most:
        return Standing(limit, limit.most - count - 1, length, now), None
    # the request that has to be out of the window for one more to fit
    query = "SELECT at FROM hits WHERE bucket = ? ORDER BY at DESC LIMIT 1 OFFSET ?"
    found = connection.execute(query, (bucket, int(limit.most) - 1)).fetchone()
    wait_s = found[0] + length - now if found and limit.most else length
    detail = f"rate limit of {limit.most:g} {_of_what(limit)} a {_SPELLED[limit.period]} reached"
    reset_s = last + length - now if last is not None else length
    return (
        Standing(limit, 0.0, reset_s),
        Failure(Code.RATE_LIMITED, detail, retry_after_s=max(0.001, wait_s)),
    )


def _amount(
    connection: sqlite3.Connection, rule: Rule, now: float
) -> tuple[Standing, Failure | None]:
    """What is left of the period's amount. The last answer may go past it: it is known then."""
    limit = rule.limit
    begin, end = period_of(limit.period, now)
    query = "SELECT amount FROM spent WHERE bucket = ? AND begin = ?"
    row = connection.execute(query, (_bucket(rule), begin)).fetchone()
    left = limit.most - (row[0] if row else 0.0)
    standing = Standing(limit, left, end - now)
    return standing, None if left > 0 else _used_up(limit, end - now)


def _used_up(limit: Limit, wait_s: float) -> Failure:
    what = f"{limit.most:,.2f} USD" if limit.name == "usd" else f"{limit.most:,.0f} {limit.name}"
    if limit.period in WINDOW_S:
        detail = f"limit of {what} a {_SPELLED[limit.period]} reached"
        return Failure(Code.RATE_LIMITED, detail, retry_after_s=wait_s)
    every = "daily" if limit.period == "day" else "monthly"
    detail = f"You have used up your {every} allocation of {what}; the next begins at 00:00 UTC"
    return Failure(Code.QUOTA, detail, retry_after_s=wait_s)


def _spend(connection: sqlite3.Connection, rule: Rule, amount: float, now: float) -> None:
    begin, _ = period_of(rule.limit.period, now)
    connection.execute(
        "INSERT INTO spent VALUES (?, ?, ?) "
        "ON CONFLICT (bucket, begin) DO UPDATE SET amount = amount + excluded.amount",
        (_bucket(rule), begin, amount),
    )


def _give_back(connection: sqlite3.Connection, rule: Rule, at: float) -> None:
    one = "SELECT rowid FROM hits WHERE bucket = ? AND at = ? LIMIT 1"
    connection.execute(f"DELETE FROM hits WHERE rowid = ({one})", (_bucket(rule), at))


def _bucket(rule: Rule) -> str:
    return f"{rule.bucket} {rule.limit.name} {rule.limit.period}"


_SPELLED = {"s": "second", "min": "minute", "hour": "hour"}


def _of_what(limit: Limit) -> str:
    return "requests" if limit.name == "requests" else f"requests ({limit.name})"


def _connect(path: Path | str) -> sqlite3.Connection:
    """For whatever thread calls, one at a time."""
    return sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def _open(path: Path, now: float) -> sqlite3.Connection:
    """The file, made if need be, for its owner alone. Raises sqlite3.Error, OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    connection = _connect(path)
    try:
        use_wal(connection)
        return _made(connection, now)
    except BaseException:
        connection.close()
        raise


def _made(connection: sqlite3.Connection, now: float) -> sqlite3.Connection:
    """With its tables, and without what is of no use any more."""
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute("DELETE FROM hits WHERE at < ?", (now - max(WINDOW_S.values()),))
    connection.execute("DELETE FROM spent WHERE begin < ?", (now - _KEPT_S,))
    return connection
