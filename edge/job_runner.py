"""What an edge does for jobs: claims them by lease, asks their requests, keeps the answers.

Any edge of the host goes on with a job whose edge is gone. A request may then be asked twice, but
one answer is kept. The requests take the way of a client's, behind all of those. Knows no API.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar
from uuid import uuid4

import anyio
import msgspec
from anyio import CapacityLimiter
from msgspec import Struct
from starlette.types import ASGIApp

from edge import inside, jobs
from edge.auth import tenant_of
from edge.inside import NO_ROOM, PRIORITY, Answered
from edge.jobs import Extra, Item, Job, Status
from edge.pace import Pace
from edge.store import Db, Store, StoreAway
from routing.drain import Drain

logger = logging.getLogger(__name__)
T = TypeVar("T")

LEASE_S = 10.0
MOST_JOBS = 4  # worked on at once by one edge
TURN_S = 30.0  # that a job is held before it makes way for those that wait
POLL_S = 0.5  # between looks for jobs that other edges have taken in, or left
AGAIN_S = 1.0  # between tries of a store that is away
RELEASE_S = 1.0
_FAILED = {408, 500}  # asked again, but not for ever
_MOST_FAILURES = 3


class Batches(Protocol):
    """How a batch begins and ends, whose requests are in a file. `edge.batch_files` has it."""

    async def admit(self, job: Job) -> None:
        """Have its requests in the store, or end it."""

    async def outputs(self, job: Job, extra: Extra, ended: Status) -> None:
        """Write its files, and say in `extra` which they are."""


@dataclass(slots=True, eq=False)
class _Held:
    """A job that this process has the lease of."""

    job: Job
    since: float  # Unix seconds
    until: float  # the lease
    status: Status
    leaves: bool = False  # for now: other jobs are to come to be held
    pace: Pace = field(default_factory=Pace)


class JobRunner:
    """`clock` gives Unix seconds, the same to all who use the store."""

    def __init__(
        self,
        store: Store,
        drain: Drain,
        clock: Callable[[], float],
        *,
        batches: Batches,
        in_flight: int,
    ) -> None:
        self._store = store
        self._drain = drain
        self._clock = clock
        self._batches = batches
        self._in_flight = in_flight
        self._held: list[_Held] = []  # the one that is held for longest first
        self._woken: anyio.Event | None = None
        self.answered: Counter[tuple[str, str]] = Counter()  # requests: kind of job, ok or failed
        drain.listeners.add(self.wake)

    def wake(self) -> None:
        """There may be something to do."""
        if self._woken is not None:
            self._woken.set()

    async def run(self, app: ASGIApp) -> None:
        """Until cancelled, or until the process is told to stop and what is held has been left."""
        self._woken = anyio.Event()
        asking = CapacityLimiter(self._in_flight)
        async with anyio.create_task_group() as tasks:
            while not self._drain.begun:
                held = await self._claim()
                if held is None:
                    with anyio.move_on_after(POLL_S):
                        await self._woken.wait()
                    self._woken = anyio.Event()
                else:
                    self._held.append(held)
                    tasks.start_soon(self._hold, held, app, asking)

    async def _claim(self) -> _Held | None:
        """A job that waits to be held. While there is no place for it, another is to make one."""
        now = self._clock()
        try:
            if not await self._store.read(partial(jobs.some_to_claim, now=now)):
                return None
            if len(self._held) >= MOST_JOBS:
                first = self._held[0]
                first.leaves = first.leaves or now - first.since >= TURN_S
                return None
            take = partial(jobs.claim, holder=uuid4().hex, now=now, lease_s=LEASE_S)
            job = await self._store.write(take)
        except StoreAway:
            return None
        return None if job is None else _Held(job, now, now + LEASE_S, job.status)

    async def _hold(self, held: _Held, app: ASGIApp, asking: CapacityLimiter) -> None:
        job = held.job
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_lease, held, tasks.cancel_scope.cancel)
                try:
                    await self._work(held, app, asking)
                except Exception:  # a job must not end the edge; it is tried again
                    logger.exception("job failed", extra={"fields": {"job": job.id}})
                    await anyio.sleep(LEASE_S)
                tasks.cancel_scope.cancel()
        finally:
            self._held.remove(held)
            with anyio.CancelScope(shield=True), anyio.move_on_after(RELEASE_S):
                await self._release(held)
            self.wake()

    async def _release(self, held: _Held) -> None:
        """What found no room for long rests, so that other jobs come to be held; and what has had
        its turn goes behind them."""
        job, now = held.job, self._clock()
        rest_s = held.pace.wait_s(now)
        rests = (held.leaves or rest_s) and not self._drain.begun
        rest_until = min(now + rest_s, job.deadline) if rests else 0.0
        release = partial(jobs.release, job=job.id, holder=job.holder, rest_until=rest_until)
        with suppress(StoreAway):  # then it runs out
            await self._store.write(release)

    async def _keep_lease(self, held: _Held, lost: Callable[[], None]) -> None:
        while self._clock() < held.until:
            await anyio.sleep(LEASE_S / 4)
            try:
                status = await self._renew(held)
            except StoreAway:
                continue
            if status is None:
                break
        lost()

    async def _renew(self, held: _Held) -> Status | None:
        """How the job stands; None when it is another's, or at its end."""
        now, job = self._clock(), held.job
        renewed = partial(jobs.renew, job=job.id, holder=job.holder, now=now, lease_s=LEASE_S)
        status = await self._store.write(renewed)
        if status is not None:
            held.until, held.status = now + LEASE_S, status
        return status

    async def _work(self, held: _Held, app: ASGIApp, asking: CapacityLimiter) -> None:
        """All that is left of the job, to its end if this process may stay so long."""
        job = held.job
        if job.status == "validating":
            await self._insist(partial(self._batches.admit, job))
            if await self._insist(partial(self._renew, held)) is None:
                return
        waiting = await self._insist(partial(self._store.read, partial(_waiting, job=job.id)))
        async with anyio.create_task_group() as tasks:
            for _ in range(min(len(waiting), self._in_flight)):
                tasks.start_soon(self._serve, held, waiting, app, asking)
        if await self._insist(partial(self._renew, held)) is None:
            return
        waiting = await self._insist(partial(self._store.read, partial(_waiting, job=job.id)))
        ended = end_of(held.status, len(waiting), self._clock() >= job.deadline)
        if ended is not None:
            await self._finish(held, ended)

    async def _finish(self, held: _Held, ended: Status) -> None:
        job, now = held.job, self._clock()
        found = partial(jobs.find, account=job.account, job=job.id, kind=job.kind)
        latest = await self._insist(partial(self._store.read, found))
        if latest is None:
            return
        extra = latest.more
        if job.kind == "batch":
            await self._insist(partial(self._batches.outputs, latest, extra, ended))
        finish = partial(jobs.finish, job=job, status=ended, extra=extra, now=now)
        await self._insist(partial(self._store.write, finish))

    async def _serve(
        self, held: _Held, waiting: deque[int], app: ASGIApp, asking: CapacityLimiter
    ) -> None:
        """One request after another, as long as there are any that should be asked."""
        while waiting and self._wanted(held):
            item = waiting.popleft()
            load = partial(jobs.next_of, job=held.job.id, place=item)
            held.status, body = await self._insist(partial(self._store.read, load))
            answered = None if body is None else await self._ask(held, app, body, asking)
            if answered is not None:
                outcome = "ok" if answered.status == 200 else "failed"
                self.answered[held.job.kind, outcome] += 1
                await self._keep(_kept(held.job.id, item, answered))

    async def _keep(self, work: Callable[[Db], bool]) -> None:
        """Not to be asked again only because this process stops now."""
        try:
            with anyio.CancelScope(shield=True):
                await self._store.write(work)
        except StoreAway:
            await self._insist(partial(self._store.write, work))

    async def _ask(
        self, held: _Held, app: ASGIApp, body: bytes, asking: CapacityLimiter
    ) -> Answered | None:
        """The answer; None where there is no more time for one here.

        `asking` is not taken while it waits for room, which other jobs may have.
        """
        job, num_failures = held.job, 0
        grant = job.more.grant
        last = replace(grant, priority=min(grant.priority, PRIORITY))
        tenant = tenant_of(job.account, job.key_id, last)
        while self._wanted(held):
            if wait_s := held.pace.wait_s(self._clock()):
                await anyio.sleep(min(wait_s, POLL_S))
                continue
            async with asking:
                if not self._wanted(held) or held.pace.wait_s(self._clock()):
                    continue
                answered = await inside.ask(app, tenant, job.route, body)
            if answered.status in NO_ROOM:  # asked again for as long as the job has time
                held.pace.busy(self._clock(), answered.retry_after_s)
                held.leaves = held.leaves or held.pace.slowest
                continue
            num_failures += 1
            if answered.status not in _FAILED or num_failures == _MOST_FAILURES:
                held.pace.fine()
                return answered
        return None

    def _wanted(self, held: _Held) -> bool:
        """Whether another request of the job may begin."""
        if self._drain.begun or held.leaves:
            return False
        return held.status == "running" and self._clock() < held.job.deadline

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Again while the store is away: the lease ends that."""
        while True:
            try:
                return await work()
            except StoreAway:
                await anyio.sleep(AGAIN_S)


def end_of(status: Status, num_waiting: int, is_late: bool) -> Status | None:  # noqa: FBT001
    """How a job ends whose requests have been asked as far as they were; None: it does not yet."""
    if status == "cancelling":
        return "cancelled"
    if not num_waiting:
        return "completed"
    return "expired" if is_late else None


def _waiting(db: Db, job: str) -> deque[int]:
    return deque(jobs.places_waiting(db, job))


def _kept(job: str, place: int, answered: Answered) -> Callable[[Db], bool]:
    item = Item(
        place=place,
        name=None,
        body=b"",
        status=answered.status,
        answer=answered.body,
        request_id=answered.request_id,
    )
    return partial(jobs.answer, job=job, item=item, used=used(answered.body))


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0  # as Responses call them
    output_tokens: int = 0


class _Result(Struct):
    usage: _Usage | None = None


class _Body(Struct):
    """Either API's."""

    usage: _Usage | None = None
    result: _Result | None = None


def used(body: bytes) -> tuple[int, int]:
    """Tokens of prompt and completion, as an answer says; none where it does not."""
    try:
        told = msgspec.json.decode(body, type=_Body)
    except msgspec.DecodeError:
        return 0, 0
    usage = told.usage or (told.result.usage if told.result else None) or _Usage()
    return usage.prompt_tokens + usage.input_tokens, usage.completion_tokens + usage.output_tokens
