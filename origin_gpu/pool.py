"""What a front knows of its workers: their reports, and what it has given them to do.

It owns the links to them, and keeps a `Watch` open on each: the worker learns of its peers by it,
and the front how the worker is. Decides nothing: see `place`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct
from msgspec.structs import replace

from infire.prefix import Chain, root
from origin_gpu.handover import CacheNews, Peer, Watch, Watched, WorkerEvent
from origin_gpu.place import Candidate
from origin_gpu.prefix_index import PrefixIndex
from origin_gpu.settings import WorkerAt, WorkerRow
from routing import wire
from routing.errors import Failure
from routing.link import Call, Link
from routing.link_flow import Wake
from routing.link_frames import Pace
from routing.region import ProcessReport

LEAVING_EVERY_S = 0.1  # looks at one that has something left
WATCH_AGAIN_S = 0.1  # after a watch has ended


class Charge:
    """Tokens given to a worker, until this is ended. Ending it twice is ending it once."""

    def __init__(self, member: Member, num_tokens: int) -> None:
        self._member = member
        self._num_tokens = num_tokens
        self._is_open = True
        member.tokens_in_flight += num_tokens
        member.num_charged += 1

    def end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._member.tokens_in_flight -= self._num_tokens
            self._member.num_charged -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self.end()


class Member:
    """One worker, as its front knows it."""

    def __init__(self, at: WorkerAt, link: Link[WorkerEvent]) -> None:
        self.at = at
        self.link = link
        self.watched: Watched | None = None  # what it said last; None while it is away
        self.kv_address: str | None = None  # kept while it is away
        self.tokens_in_flight = 0
        self.num_charged = 0  # requests that these tokens are of
        self.watching: Call | None = None
        self.watch_ended = Wake()
        self.leaving = False  # it gets nothing new, and is forgotten when it has nothing left
        self.scope: anyio.CancelScope | None = None  # of what keeps it, while that runs

    def candidate(self, cached_tokens: int = 0) -> Candidate | None:
        """As `place` sees it; None unless it is ready."""
        if self.watched is None or not self.watched.report.ready or self.leaving:
            return None
        report = self.watched.report
        return Candidate(
            name=self.at.name,
            role=self.at.role,
            models=report.models,
            layout_digest=self.watched.layout_digest,
            room=max(0, report.max_waiting - report.waiting),
            idle=self._idle(report),
            tokens_in_flight=self.tokens_in_flight,
            cached_tokens=cached_tokens,
        )

    def _idle(self, report: ProcessReport) -> int:
        """Requests that could begin there at once: counted here, for reports are a little late."""
        if report.waiting:
            return 0
        return max(0, report.max_running - self.num_charged) if report.max_running else 1

    def caches(self, model: str) -> tuple[str, int] | None:
        """Digest of the model, and tokens of a block, as far as it has any of it in blocks."""
        if self.watched is None or not self.watched.block_tokens:
            return None
        reports = self.watched.report.models
        digest = next((it.model_digest for it in reports if it.model == model), None)
        return None if digest is None else (digest, self.watched.block_tokens)

    @property
    def peer(self) -> Peer | None:
        """As its peers are told of it; None as long as its KV door is not known."""
        if self.kv_address is None:
            return None
        return Peer(
            name=self.at.name, role=self.at.role, url=self.at.url, kv_address=self.kv_address
        )


class NameTaken(ValueError):
    """A worker is to have the name of another that is not gone yet."""


class Pool:
    """All workers of a region."""

    def __init__(self, workers: Iterable[WorkerAt], secret: str, pace: Pace | None = None) -> None:
        self._secret = secret
        self._pace = pace
        self._tasks: TaskGroup | None = None  # while it runs
        self.members: dict[str, Member] = {}
        for at in workers:
            self._add(at)
        self.prefixes = PrefixIndex()
        self.num_resyncs = 0  # watches begun anew because news of a cache were lost

    async def run(self) -> None:
        """Keep links to all workers and watch them, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            for member in self.members.values():
                tasks.start_soon(self._keep, member)

    def set_workers(self, workers: Sequence[WorkerAt]) -> None:
        """Have these from now on: others get nothing new, and go when they have nothing left.

        NameTaken, and nothing is changed, where one is another than that of its name.
        """
        for at in workers:
            if (known := self.members.get(at.name)) and known.at != at:
                raise NameTaken(f"{at.name} is {known.at.role} at {known.at.url} still")
        wanted = {at.name: at for at in workers}
        for name, member in self.members.items():
            member.leaving = name not in wanted
            if member.leaving and self._tasks:
                self._tasks.start_soon(self._let_go, member)
        for at in workers:
            if at.name not in self.members:
                member = self._add(at)
                if self._tasks:
                    self._tasks.start_soon(self._keep, member)

    def _add(self, at: WorkerAt) -> Member:
        link = Link[WorkerEvent](at.url, self._secret, WorkerEvent, pace=self._pace)
        member = self.members[at.name] = Member(at, link)
        return member

    async def _keep(self, member: Member) -> None:
        """A link to it, and a watch, until it is forgotten."""
        with anyio.CancelScope() as member.scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(member.link.run)
                tasks.start_soon(self._keep_watching, member)

    async def _let_go(self, member: Member) -> None:
        """Forget it once nothing is asked of it, but to be watched; unless it is wanted again."""
        # Looked at, not told: who counts tokens has no need to know.
        while member.tokens_in_flight or member.link.num_open > 1:  # noqa: ASYNC110
            await anyio.sleep(LEAVING_EVERY_S)
        if member.leaving and self.members.get(member.at.name) is member:
            del self.members[member.at.name]
            self.prefixes.forget(member.at.name)
            if member.scope is not None:
                member.scope.cancel()
            self._spread_the_table()

    def rows(self) -> list[WorkerRow]:
        """Those that may get something new."""
        members = (it for it in self.members.values() if not it.leaving)
        return [WorkerRow(it.at.name, it.at.role, it.at.url) for it in members]

    def candidates(
        self, request: wire.Generate | None = None, *, excluding: Iterable[str] = ()
    ) -> list[Candidate]:
        """The workers that are ready now, with what their caches should have of `request`."""
        cached = self._cached(request) if request else {}
        found = (it.candidate(cached.get(name, 0)) for name, it in self.members.items())
        return [it for it in found if it is not None and it.name not in excluding]

    def _cached(self, request: wire.Generate) -> dict[str, int]:
        """Tokens of the request, output so far included, that are known to be at each worker."""
        alike: dict[tuple[str, int], list[str]] = {}  # workers whose caches have the same keys
        for name, member in self.members.items():
            if shape := member.caches(request.model):
                alike.setdefault(shape, []).append(name)
        ids = request.token_ids + request.generated_ids
        cached: dict[str, int] = {}
        for (digest, size), names in alike.items():
            chain = Chain(root(request.tenant_salt, digest, request.adapter), size)
            most = (len(ids) - 1) // size  # the last token is computed in any case
            found = self.prefixes.num_found(names, chain, ids, most)
            cached.update((name, size * count) for name, count in found.items())
        return cached

    def reports(self) -> tuple[ProcessReport, ...]:
        """The last words of the workers that are here."""
        return tuple(it.watched.report for it in self.members.values() if it.watched)

    def urls_with_tokenizer(self, digest: str) -> list[str]:
        """Workers whose models' text assets have this digest."""
        return [
            it.at.url
            for it in self.members.values()
            if it.watched and any(m.tokenizer_digest == digest for m in it.watched.report.models)
        ]

    def layout(self, worker: str) -> str:
        """Digest of the KV layout that it said last."""
        watched = self.members[worker].watched
        return watched.layout_digest if watched else ""

    def leave_out(self, worker: str) -> None:
        """It takes nothing new, which it is about to say itself."""
        member = self.members[worker]
        if member.watched is not None:
            report = replace(member.watched.report, ready=False)
            member.watched = replace(member.watched, report=report)

    def charge(self, worker: str, num_tokens: int) -> Charge:
        """Count `num_tokens` as in flight at `worker` until the charge is ended."""
        return Charge(self.members[worker], num_tokens)

    def open(
        self, worker: str, request: Struct, sink: Callable[[WorkerEvent | None], None]
    ) -> Call:
        """A stream at `worker`; as `Link.open_nowait`."""
        return self.members[worker].link.open_nowait(request, sink)

    async def _keep_watching(self, member: Member) -> None:
        while True:
            await member.link.wait_connected()
            with suppress(Failure):  # it may be lost again before it was our turn
                self._watch(member)
                await member.watch_ended.wait()
            await anyio.sleep(WATCH_AGAIN_S)

    def _watch(self, member: Member) -> None:
        """Tell `member` of its peers, and listen to how it is from now on."""
        if self.members.get(member.at.name) is not member:
            return
        if member.watching is not None:
            member.watching.cancel()
        peers = tuple(it.peer for it in self.members.values() if it.peer)
        member.watching = member.link.open_nowait(Watch(peers), partial(self._hear, member))

    def _hear(self, member: Member, event: WorkerEvent | None) -> None:
        if isinstance(event, CacheNews):
            if not self.prefixes.hear(member.at.name, event):
                self.num_resyncs += 1
                self._watch(member)
        elif isinstance(event, Watched):
            member.watched = event
            if event.kv_address != member.kv_address:
                member.kv_address = event.kv_address
                self._spread_the_table()
        else:  # a fault, or the end: it is gone, or cannot be watched
            member.watched = None
            member.watching = None
            self.prefixes.forget(member.at.name)
            member.watch_ended.set()

    def _spread_the_table(self) -> None:
        """At once, so that on every link it goes ahead of the first ticket it is needed for."""
        for member in self.members.values():
            if member.watching is not None:
                self._watch(member)
