"""Answers that are given once and told again: by idempotency key, and from the response cache.

Of several that ask the same at once, in whatever process, one is the first and has the lease of the
answer's row. What is kept is a whole answer that went well, also a streamed one, which is told
again in one burst. Knows no API.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal
from uuid import uuid4

import anyio
import msgspec
from msgspec import Struct
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.clients import Clients
from edge.door import record_of
from edge.store import Db, StoreAway
from edge.store_routes import Ground
from routing.errors import Code, Failure

LEASE_S = 10.0
MOST_BYTES = 4_000_000  # of an answer; a longer one is not kept
CACHE_BYTES = 256_000_000  # of all that the cache keeps; then the oldest go
KEY_BYTES = 256_000_000  # of all that one account's idempotency keys keep, likewise
KEY_S = 86_400.0  # that an idempotency key holds
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 0.25  # between looks whether another's answer is there
_UNDONE_S = 3600.0  # after which the row of an answer that never came is dropped
_KEPT_HEADERS = {b"content-type", b"x-served-by", b"cache-control", b"x-accel-buffering"}

Header = tuple[bytes, bytes]


class Slot(Struct, frozen=True, kw_only=True):
    """Where an answer is kept."""

    kind: Literal["key", "cache"]
    account: str
    name: str
    digest: str  # of what was asked: another under the same name is refused

    @property
    def where(self) -> tuple[str, str, str]:
        return self.kind, self.account, self.name


class Kept(Struct, frozen=True, kw_only=True):
    """An answer, as it was told."""

    status: int
    headers: list[Header]
    model: str | None
    body: bytes


class Busy(Struct, frozen=True):
    """Somebody is at it."""


class Replies:
    def __init__(self, ground: Ground, clients: Clients) -> None:
        self._ground = ground
        self._store = ground.store
        self._clients = clients

    def once(self, endpoint: ASGIApp, slot: Slot) -> ASGIApp:
        """The endpoint for a request with an idempotency key: asked once, told as often as it is
        sent. One that is sent while it is asked gets a 409. Without the store, 503."""

        async def ask_once(scope: Scope, receive: Receive, send: Send) -> None:
            holder = uuid4().hex
            match await self._claim(slot, holder):
                case Kept() as kept:
                    await _tell(kept, scope, send, [(b"idempotent-replayed", b"true")])
                case Busy():
                    says = "a request with this Idempotency-Key is being answered, try again soon"
                    raise Failure(Code.CONFLICT, says, retry_after_s=1.0)
                case None:
                    lead = _Lead(self._ground, slot, holder, keep_s=KEY_S)
                    await lead.serve(endpoint, scope, receive, send)

        return ask_once

    def cached(self, endpoint: ASGIApp, slot: Slot, ttl_s: float) -> ASGIApp:
        """The endpoint behind the cache. Who asks what somebody is just being told waits for that.

        When that fails, or the store is away, each asks for itself.
        """

        async def ask_cached(scope: Scope, receive: Receive, send: Send) -> None:
            holder = uuid4().hex
            try:
                found = await self._claim(slot, holder)
                if isinstance(found, Busy):
                    work = partial(self._wait, slot, holder)
                    found, left = await self._attended(scope, receive, send, work)
                    if left is not None:
                        record_of(scope).outcome = left
                        return
            except StoreAway:
                found = Busy()
            if isinstance(found, Kept):
                await _tell(found, scope, send, [(b"cf-aig-cache-status", b"HIT")])
            elif isinstance(found, Busy):
                await endpoint(dict(scope), receive, _marked(send, _MISS))
            else:
                lead = _Lead(self._ground, slot, holder, keep_s=ttl_s)
                await lead.serve(endpoint, scope, receive, _marked(send, _MISS))

        return ask_cached

    async def _attended(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Callable[[], Awaitable[Kept | Busy | None]],
    ) -> tuple[Kept | Busy | None, str | None]:
        """What `work` found; and how the client left, if it did before."""
        found: Kept | Busy | None = Busy()

        async def wait(send: Send) -> None:
            nonlocal found
            budget_s = self._ground.settings.budget_s
            with anyio.move_on_after(budget_s), self._ground.drain.until_cut():
                found = await work()

        left = await self._clients.attend(scope, receive, send, wait)
        return found, left

    async def _wait(self, slot: Slot, holder: str) -> Kept | Busy | None:
        """Until the answer is there, or `holder` is to make it (None), or whoever was at it has
        failed (Busy: they are many who wait, and each asks for itself)."""
        pause_s = _FIRST_LOOK_S
        while True:
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_LOOK_S)
            now = self._ground.clock()
            is_there, found = await self._store.read(partial(_stands, slot=slot, now=now))
            if isinstance(found, Kept):
                return found
            if not is_there:
                return Busy()
            if found is None:  # whoever was at it is dead
                found = await self._claim(slot, holder)
                if not isinstance(found, Busy):
                    return found

    async def _claim(self, slot: Slot, holder: str) -> Kept | Busy | None:
        """None: `holder` is the one to make the answer."""
        now = self._ground.clock()
        found = await self._store.read(partial(look, slot=slot, now=now))
        if found is None:
            found = await self._store.write(partial(claim, slot=slot, holder=holder, now=now))
        return found


class _Lead:
    """Makes the answer that others wait for."""

    def __init__(self, ground: Ground, slot: Slot, holder: str, *, keep_s: float) -> None:
        self._ground = ground
        self._slot = slot
        self._holder = holder
        self._keep_s = keep_s
        self._settled = False  # kept, or left to others

    async def serve(self, endpoint: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Failure | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._renew)
                try:
                    # Of a copy of the scope the connection knows nothing: all is sent by `send`.
                    await endpoint(dict(scope), receive, self._hearing(scope, send))
                except Failure as exc:
                    failure = exc  # raised below: out of here it would be an ExceptionGroup
                tasks.cancel_scope.cancel()
        finally:
            if not self._settled:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
                    await self._write(release)
        if failure is not None:
            raise failure

    def _hearing(self, scope: Scope, send: Send) -> Send:
        """`send` that keeps what it is given, before its end is told."""
        record, body = record_of(scope), bytearray()
        status, headers = 0, list[Header]()

        async def hear(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [pair for pair in message["headers"] if pair[0] in _KEPT_HEADERS]
            elif len(body) <= MOST_BYTES:
                body.extend(message.get("body", b""))
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            is_good = status == 200 and record.outcome == "ok" and len(body) <= MOST_BYTES
            if is_last and is_good:
                kept = Kept(status=status, headers=headers, model=record.model, body=bytes(body))
                forget = self._ground.clock() + self._keep_s
                self._settled = await self._write(partial(keep, kept=kept, forget=forget))
            elif is_last:
                self._settled = await self._write(release)
            await send(message)

        return hear

    async def _renew(self) -> None:
        while True:
            await anyio.sleep(LEASE_S / 4)
            await self._write(partial(renew, until=self._ground.clock() + LEASE_S))

    async def _write(self, work: Callable[..., None]) -> bool:
        with suppress(StoreAway):
            await self._ground.store.write(partial(work, slot=self._slot, holder=self._holder))
            return True
        return False


_MISS: list[Header] = [(b"cf-aig-cache-status", b"MISS")]


def _marked(send: Send, marks: Sequence[Header]) -> Send:
    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *marks]
        await send(message)

    return send_marked


async def _tell(kept: Kept, scope: Scope, send: Send, marks: Sequence[Header]) -> None:
    record = record_of(scope)
    record.model, record.cached = kept.model, True
    length = (b"content-length", str(len(kept.body)).encode())
    headers = [*kept.headers, *marks, length]
    await send({"type": "http.response.start", "status": kept.status, "headers": headers})
    await send({"type": "http.response.body", "body": kept.body})


def look(db: Db, slot: Slot, now: float) -> Kept | Busy | None:
    """The answer, or that somebody is at it. Failure where the name was used for something else."""
    return _stands(db, slot, now)[1]


def _stands(db: Db, slot: Slot, now: float) -> tuple[bool, Kept | Busy | None]:
    """Whether there is a row at all, and what it says."""
    row = db.execute(
        "SELECT digest, status, head, body, lease_until FROM replies"
        " WHERE kind = ? AND account = ? AND name = ? AND forget > ?",
        (*slot.where, now),
    ).fetchone()
    if row is None:
        return False, None
    digest, status, head, body, lease_until = row
    is_busy = status is None and lease_until > now
    if digest != slot.digest and (is_busy or status is not None):
        says = "this Idempotency-Key came before with another request"
        raise Failure(Code.KEY_REUSED, says)
    if status is None:
        return True, Busy() if is_busy else None
    headers, model = msgspec.msgpack.decode(head, type=tuple[list[Header], str | None])
    return True, Kept(status=status, headers=headers, model=model, body=body)


def claim(db: Db, slot: Slot, holder: str, now: float) -> Kept | Busy | None:
    """As `look`, but of what nobody is at `holder` has the lease then."""
    found = look(db, slot, now)
    if found is None:
        db.execute(
            "INSERT INTO replies (kind, account, name, digest, num_bytes, created, forget,"
            " holder, lease_until) VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)"
            " ON CONFLICT (kind, account, name) DO UPDATE SET digest = excluded.digest,"
            " status = NULL, head = NULL, body = NULL, num_bytes = 0, created = excluded.created,"
            " forget = excluded.forget, holder = excluded.holder,"
            " lease_until = excluded.lease_until",
            (*slot.where, slot.digest, now, now + _UNDONE_S, holder, now + LEASE_S),
        )
    return found


def renew(db: Db, slot: Slot, holder: str, until: float) -> None:
    db.execute(f"UPDATE replies SET lease_until = ? {_MINE}", (until, *slot.where, holder))


def keep(db: Db, slot: Slot, holder: str, kept: Kept, forget: float) -> None:
    head = msgspec.msgpack.encode((kept.headers, kept.model))
    db.execute(
        f"UPDATE replies SET status = ?, head = ?, body = ?, num_bytes = ?, forget = ? {_MINE}",
        (kept.status, head, kept.body, len(kept.body), forget, *slot.where, holder),
    )


def release(db: Db, slot: Slot, holder: str) -> None:
    """It came to nothing: the next is the first again."""
    db.execute(f"DELETE FROM replies {_MINE}", (*slot.where, holder))


_MINE = "WHERE kind = ? AND account = ? AND name = ? AND holder = ? AND status IS NULL"


def prune(
    db: Db, now: float, limit: int, *, cache_bytes: int = CACHE_BYTES, key_bytes: int = KEY_BYTES
) -> int:
    """Drop what has had its time, then the oldest of what is too much; how many."""
    query = "SELECT kind, account, name FROM replies WHERE forget <= ? LIMIT ?"
    gone = db.execute(query, (now, limit)).fetchall()
    for kind, whose, most in (("cache", "kind", cache_bytes), ("key", "account", key_bytes)):
        gone += db.execute(
            "SELECT kind, account, name FROM (SELECT kind, account, name, sum(num_bytes)"
            f" OVER (PARTITION BY {whose} ORDER BY created DESC, name) AS size FROM replies"
            " WHERE kind = ? AND num_bytes > 0 AND forget > ?) AS newer WHERE size > ? LIMIT ?",
            (kind, now, most, limit - len(gone)),
        ).fetchall()
    db.executemany("DELETE FROM replies WHERE kind = ? AND account = ? AND name = ?", gone)
    return len(gone)
