"""Responses that were asked to be stored: what `previous_response_id` and references go back to.

An account sees its own alone. What was not used for a month is gone, and so are the oldest of an
account that has stored too many or too much. Knows no HTTP, and of a response only its id
and the one before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from edge.store import Db, Store

_T = TypeVar("_T")

MOST_TURNS = 1000  # of one conversation
_DAY_S = 86400.0

_FIND = "SELECT body FROM responses WHERE id = ? AND account = ? AND forget > ?"
_PUT = "INSERT INTO responses (id, account, body, created, forget) VALUES (?, ?, ?, ?, ?)"
_USE = "UPDATE responses SET forget = ? WHERE id = ? AND account = ?"
_DELETE = "DELETE FROM responses WHERE id = ? AND account = ? AND forget > ?"
_PRUNE = "DELETE FROM responses WHERE id IN (SELECT id FROM responses WHERE forget < ? LIMIT ?)"
_OVER = """
DELETE FROM responses WHERE account = ? AND id IN (
    SELECT id FROM (
        SELECT id, row_number() OVER newest AS number, sum(length(body)) OVER newest AS num_bytes
        FROM responses WHERE account = ? WINDOW newest AS (ORDER BY forget DESC, id)
    ) AS kept WHERE number > ? OR num_bytes > ?
)
"""


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


class _Told(Struct, frozen=True):
    output: list[dict[str, Any]]


class Earlier(Struct, frozen=True, kw_only=True):
    """A turn of a conversation, without what its response repeats of the request: that may be
    megabytes of what no model is shown, in each of a thousand turns."""

    id: str
    previous: str | None
    response: _Told
    input: list[dict[str, Any]]

    @property
    def items(self) -> list[dict[str, Any]]:
        return [*self.input, *self.response.output]


class ResponsesStore:
    """`clock` gives Unix seconds. Raises StoreAway. Without a store nothing is kept."""

    def __init__(
        self, store: Store | None, clock: Callable[[], float], bounds: Bounds | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._bounds = bounds or Bounds()
        self._num_put: Counter[str] = Counter()  # by account

    async def put(self, account: str, stored: Stored) -> None:
        """Any process finds it once this returns."""
        if self._store is None:
            return
        # At first, too: processes come and go. Said here, for others put theirs meanwhile.
        looks = self._num_put[account] % self._bounds.each == 0
        self._num_put[account] += 1
        body = msgspec.json.encode(stored)
        await self._store.write(partial(self._put, account, stored, body, looks=looks))

    async def get(self, account: str, response_id: str) -> Stored | None:
        if self._store is None:
            return None
        return await self._store.read(partial(_find, Stored, account, response_id, self._clock()))

    async def chain(self, account: str, response_id: str) -> list[Earlier] | None:
        """The conversation up to this response, oldest first; None when not all of it is there."""
        if self._store is None:
            return None
        return await self._store.write(partial(self._chain, account, response_id))

    async def delete(self, account: str, response_id: str) -> bool:
        """Whether it was there."""

        def work(db: Db) -> bool:
            return db.execute(_DELETE, (response_id, account, self._clock())).rowcount > 0

        return self._store is not None and await self._store.write(work)

    def _put(self, account: str, stored: Stored, body: bytes, db: Db, *, looks: bool) -> None:
        now, bounds = self._clock(), self._bounds
        db.execute(_PUT, (stored.id, account, body, now, self._forget(now)))
        if looks:
            db.execute(_OVER, (account, account, bounds.most, bounds.most_bytes))

    def _chain(self, account: str, response_id: str, db: Db) -> list[Earlier] | None:
        now, found, wanted = self._clock(), list[Earlier](), response_id
        while len(found) < MOST_TURNS:
            stored = _find(Earlier, account, wanted, now, db)
            if stored is None:
                return None
            found.append(stored)
            if stored.previous is None:
                db.executemany(_USE, [(self._forget(now), one.id, account) for one in found])
                return found[::-1]
            wanted = stored.previous
        return None

    def _forget(self, now: float) -> float:
        return now + self._bounds.days * _DAY_S


def prune(db: Db, now: float, most: int) -> int:
    """Drop what was not used for long, so many at most; how many that were."""
    return db.execute(_PRUNE, (now, most)).rowcount


def _find(kind: type[_T], account: str, response_id: str, now: float, db: Db) -> _T | None:
    row = db.execute(_FIND, (response_id, account, now)).fetchone()
    return None if row is None else msgspec.json.decode(row[0], type=kind)
