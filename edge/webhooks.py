"""Tells URLs that clients named that their jobs are done, until they take it or days have passed.

Signed as Standard Webhooks has it (github.com/standard-webhooks/standard-webhooks): HMAC-SHA256
over id, time and body with the account's own secret, so that OpenAI's clients can verify it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from functools import partial
from uuid import uuid4

import anyio
import httpx2
from msgspec import Struct

from edge.public_urls import NotPublic, target
from edge.store import Db, Store, StoreAway
from routing.drain import Drain
from routing.errors import Failure
from routing.logs import log

logger = logging.getLogger(__name__)

POLL_S = 0.5
TRY_S = 15.0  # of one try, whatever the receiver does
LEASE_S = 30.0  # longer than a try
AFTER_S = (2.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 36_000.0)  # tries again; then it is given up
MOST_AT_ONCE = 8
_SECRET_BYTES = 32


class Hook(Struct, frozen=True, kw_only=True):
    """A row, in the order of its columns."""

    job: str
    url: str
    account: str
    tries: int


class Webhooks:
    """`told` makes the body that says how a job ended; None when the job is gone."""

    def __init__(
        self,
        store: Store,
        drain: Drain,
        clock: Callable[[], float],
        told: Callable[[Db, Hook], bytes | None],
        *,
        allow_private: bool,
    ) -> None:
        self._store = store
        self._drain = drain
        self._clock = clock
        self._told = told
        self._allow_private = allow_private
        self._num_calling = 0
        self.calls: Counter[str] = Counter()  # made, by how: taken, again, given_up

    async def run(self) -> None:
        """Call what is due, until cancelled."""
        client = httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=TRY_S)
        async with client, anyio.create_task_group() as tasks:
            while True:
                may = self._num_calling < MOST_AT_ONCE and not self._drain.begun
                claimed = await self._claim() if may else None
                if claimed is None:
                    await anyio.sleep(POLL_S)
                else:
                    self._num_calling += 1
                    tasks.start_soon(self._call, client, *claimed)

    async def _claim(self) -> tuple[Hook, str] | None:
        """One that is due, and in whose name it was taken."""
        now, holder = self._clock(), uuid4().hex
        try:
            if not await self._store.read(partial(_some_due, now=now)):
                return None
            hook = await self._store.write(partial(claim, holder=holder, now=now, lease_s=LEASE_S))
        except StoreAway:
            return None
        return None if hook is None else (hook, holder)

    async def _call(self, client: httpx2.AsyncClient, hook: Hook, holder: str) -> None:
        try:
            key = await self._store.write(partial(secret_of, account=hook.account))
            body = await self._store.look_through(hook.account, lambda db: self._told(db, hook))
            why = "the job is gone" if body is None else await self._try(client, hook, key, body)
            is_over = why is None or body is None or hook.tries >= len(AFTER_S)
            due = None if is_over else self._clock() + AFTER_S[hook.tries]
            again = due is not None
            self.calls["taken" if why is None else "again" if again else "given_up"] += 1
            log(logger, "webhook", job=hook.job, account=hook.account, failed=why, again=again)
            await self._store.write(partial(settle, job=hook.job, holder=holder, due=due))
        except Failure:
            pass  # of the store: its lease runs out, and it is called again
        finally:
            self._num_calling -= 1

    async def _try(
        self, client: httpx2.AsyncClient, hook: Hook, key: bytes, body: bytes
    ) -> str | None:
        """Why it was not taken; None: it was."""
        try:
            with anyio.fail_after(TRY_S):
                found = await target(hook.url, allow_private=self._allow_private)
                headers = signed(hook.job, int(self._clock()), body, key)
                response = await client.send(found.request(client, body, headers), stream=True)
                await response.aclose()
        except (NotPublic, httpx2.HTTPError, OSError, TimeoutError) as exc:
            return str(exc) or type(exc).__name__
        except Exception as exc:  # a receiver must not end the edge; it is tried again
            logger.exception("webhook failed", extra={"fields": {"job": hook.job}})
            return type(exc).__name__
        return None if response.is_success else f"status {response.status_code}"


def signed(event: str, now: int, body: bytes, key: bytes) -> dict[str, str]:
    """The headers of a call: who it is from, and that nobody has changed it."""
    message = f"{event}.{now}.".encode() + body
    signature = b64encode(hmac.digest(key, message, "sha256")).decode()
    return {
        "content-type": "application/json",
        "user-agent": "edgefire",
        "webhook-id": event,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{signature}",
    }


def spelled(key: bytes) -> str:
    """A secret as libraries take it."""
    return f"whsec_{b64encode(key).decode()}"


def secret_of(db: Db, account: str) -> bytes:
    """The account's, made when it is first asked for."""
    made = secrets.token_bytes(_SECRET_BYTES)
    db.execute(
        "INSERT INTO secrets (account, secret) VALUES (?, ?) ON CONFLICT (account) DO NOTHING",
        (account, made),
    )
    row = db.execute("SELECT secret FROM secrets WHERE account = ?", (account,)).fetchone()
    return bytes(row[0])


def claim(db: Db, holder: str, now: float, lease_s: float) -> Hook | None:
    """One that is due, of an account of which the fewest are being called: receivers that are slow
    keep nobody else waiting."""
    row = db.execute(
        "UPDATE hooks SET holder = ?, lease_until = ? WHERE job ="
        " (SELECT job FROM hooks LEFT JOIN (SELECT account AS who, count(*) AS num FROM hooks"
        " WHERE lease_until >= ? GROUP BY account) AS busy ON busy.who = hooks.account"
        " WHERE due <= ? AND lease_until < ? ORDER BY coalesce(busy.num, 0), due LIMIT 1)"
        " RETURNING job, url, account, tries",
        (holder, now + lease_s, now, now, now),
    ).fetchone()
    return None if row is None else Hook(job=row[0], url=row[1], account=row[2], tries=row[3])


def settle(db: Db, job: str, holder: str, due: float | None) -> None:
    """It was called: not again, or when it is `due`."""
    if due is None:
        db.execute("DELETE FROM hooks WHERE job = ? AND holder = ?", (job, holder))
        return
    db.execute(
        "UPDATE hooks SET tries = tries + 1, due = ?, lease_until = 0 WHERE job = ? AND holder = ?",
        (due, job, holder),
    )


def _some_due(db: Db, now: float) -> bool:
    query = "SELECT 1 FROM hooks WHERE due <= ? AND lease_until < ? LIMIT 1"
    return db.execute(query, (now, now)).fetchone() is not None
