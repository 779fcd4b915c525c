"""A worker's requests inside its engine, one life of the engine after another.

Leaves the engine notes, hands what a step brings to each request's own `on_step`, synchronously:
no task waits for a token. Starts the engine again when it dies, until it dies too often. Knows no
request of the wire and no other worker.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic

import anyio
import msgspec

from infire.notes import (
    Adopted,
    Answer,
    Broken,
    Drop,
    Embedded,
    EmbedTexts,
    Exported,
    FromEngine,
    Gauges,
    Hello,
    Note,
    Refused,
    Results,
    Submit,
)
from infire.request import Step
from origin_gpu.cache_news import CacheMirror
from origin_gpu.engine_process import EngineLost, EngineSocket, engine_process
from routing.errors import Code, Failure
from routing.link_flow import Patience, Wake
from routing.logs import log

logger = logging.getLogger(__name__)

FRESH_S = 5.0  # an engine that has said nothing for longer gets no work: it beats once a second
STUCK_S = 60.0  # and one that still says nothing is ended, and another started
MOST_RESTARTS, WITHIN_S = 5, 60.0  # one that needs more in so long is given up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 4.0  # before it is started again
RETRY_AFTER_S = 1.0


class EngineGone(Exception):
    """No engine can be kept running. Says why."""


class Run:
    """One request inside the engine, for the length of a `request` block."""

    def __init__(self, key: str, on_step: Callable[[Step], None]) -> None:
        self.key = key  # its id in there
        self.scope = anyio.CancelScope()  # the block: cancelled when the request has failed
        self.failure: Failure | None = None
        self.last: Step | None = None  # the one with which it finished
        self.embedded: Embedded | None = None  # its vectors, where those were asked for
        self.on_step = on_step
        self.on_export: Callable[[Exported], None] = lambda _: None
        self._finished = anyio.Event()
        self._adopted = anyio.Event()

    async def wait_finished(self) -> Step:
        """The last step."""
        await self._finished.wait()
        assert self.last is not None
        return self.last

    async def wait_embedded(self) -> Embedded:
        """The vectors of an `EmbedTexts`."""
        await self._finished.wait()
        assert self.embedded is not None
        return self.embedded

    @property
    def ended(self) -> bool:
        return self.last is not None or self.embedded is not None

    async def wait_adopted(self) -> None:
        """Until the file of the `Submit` has been read."""
        await self._adopted.wait()

    def finish(self, last: Step) -> None:
        self.last = last
        self._finished.set()

    def hear_answer(self, answer: Answer) -> None:
        match answer:
            case Adopted():
                self._adopted.set()
            case Exported():
                self.on_export(answer)
            case Embedded():
                self.embedded = answer
                self._finished.set()
            case Refused():
                self.fail(Failure(Code(answer.code), answer.detail))

    def fail(self, failure: Failure) -> None:
        """Have the block left with `failure`, whatever in it is being waited for."""
        self.failure = failure
        self.scope.cancel()


class EngineLink:
    """One engine after another, should one end; at most one at a time."""

    def __init__(
        self, command: Sequence[str], *, tokenizer_digest: str = "", stuck_s: float = STUCK_S
    ) -> None:
        """`tokenizer_digest`: of what makes the ids that it is going to be given."""
        self.hello: Hello | None = None  # None: not up
        self.gauges = Gauges(step=0)
        self.epoch = ""  # of its life
        self.layout_digest = ""  # of its KV, while it is up
        self.cache = CacheMirror()  # what its prefix cache has
        self.num_starts = 0
        self.listeners: set[Wake] = set()  # set at once for what `_told` says
        self._command = tuple(command)
        self._tokenizer_digest = tokenizer_digest
        self._stuck_s = stuck_s
        self._heard_at = 0.0
        self._ever_up = False
        self._runs: dict[str, Run] = {}
        self._numbers = itertools.count(1)
        self._notes: list[Note] = []  # that the next frame will say
        self._wake = Wake()

    @property
    def fresh(self) -> bool:
        """Whether the engine is up, and said something lately."""
        return self.hello is not None and monotonic() - self._heard_at < FRESH_S

    @property
    def cached_block_tokens(self) -> int:
        """Tokens of a block that its prefix cache finds; 0 where there is none."""
        sizes = {group.block_tokens for group in self.hello.layout.groups} if self.hello else {0}
        return sizes.pop() if len(sizes) == 1 else 0

    def must_be_up(self) -> Hello:
        """What the engine is. Failure(UNAVAILABLE) when there is none."""
        if self.hello is None:
            raise Failure(Code.UNAVAILABLE, "the engine is not up", retry_after_s=RETRY_AFTER_S)
        return self.hello

    @asynccontextmanager
    async def request(
        self, submit: Submit, on_step: Callable[[Step], None]
    ) -> AsyncGenerator[Run, None]:
        """Run a sequence for the length of the block; leaving it drops what is left of it.

        `on_step` is called where results arrive, so it must not wait. A `Failure` ends the
        block when the engine refuses the sequence or dies, also while the sequence is only held.
        """
        run = Run(self._key(submit.sequence.request_id), on_step)
        sequence = msgspec.structs.replace(submit.sequence, request_id=run.key)
        note = msgspec.structs.replace(submit, sequence=sequence)
        async with self._running(run, note, hold=sequence.hold):
            yield run

    async def embed(self, request: EmbedTexts) -> Embedded:
        """The vectors of all its texts; cancelled, the rest of them is not computed.

        A `Failure` as for `request`.
        """
        run = Run(self._key(request.request_id), lambda _: None)
        note = msgspec.structs.replace(request, request_id=run.key)
        async with self._running(run, note, hold=False):
            return await run.wait_embedded()

    def _key(self, request_id: str) -> str:
        """An id that no other request in there ever had: a late word on a dropped one reaches
        nobody."""
        return f"{request_id}#{next(self._numbers)}"

    @asynccontextmanager
    async def _running(
        self, run: Run, note: Submit | EmbedTexts, *, hold: bool
    ) -> AsyncGenerator[None, None]:
        self.must_be_up()
        self._runs[run.key] = run
        self._note(note)
        try:
            with run.scope:
                yield
        finally:
            known = self._runs.pop(run.key, None) is not None
            if known and run.failure is None and (hold or not run.ended):
                self._note(Drop(run.key))
        if run.failure is not None and run.scope.cancelled_caught:
            raise run.failure

    async def run(self) -> None:
        """Keep an engine until cancelled.

        Raises EngineGone when it dies again and again, or has never been up.
        """
        deaths: deque[float] = deque()
        while True:
            self.num_starts += 1
            self.epoch = secrets.token_hex(8)
            try:
                async with engine_process(self._command) as sock:
                    await self._talk(sock)
            except EngineLost as lost:
                if not self._ever_up:  # a wrong model or device: whoever starts it is told at once
                    raise EngineGone(str(lost)) from lost
                await anyio.sleep(_pause_s(deaths, lost))

    async def _talk(self, sock: EngineSocket) -> None:
        """One life of the engine. Ends with EngineLost, or is cancelled."""
        lost = EngineLost("this worker stops")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, sock)
                try:
                    with anyio.CancelScope() as reading:
                        tasks.start_soon(self._watch, reading)
                        await self._read(sock)
                    lost = EngineLost(f"it has said nothing for {self._stuck_s:g} s")
                except EngineLost as exc:  # raised below: in here, it would come out in a group
                    lost = exc
                tasks.cancel_scope.cancel()
        finally:
            self._lose(lost)
        raise lost

    async def _watch(self, reading: anyio.CancelScope) -> None:
        """Have the reading end once an engine that was up has said nothing for too long."""
        period_s = self._stuck_s / 8
        patience = Patience(self._stuck_s, period_s)
        heard_at = self._heard_at
        while self.hello is None or heard_at != self._heard_at or not patience.lost():
            if self.hello is None or heard_at != self._heard_at:
                patience.sign()
            heard_at = self._heard_at
            await anyio.sleep(period_s)
        reading.cancel()

    async def _write(self, sock: EngineSocket) -> None:
        """One frame for all notes of a tick."""
        while True:
            await self._wake.wait()
            notes, self._notes = self._notes, []
            try:
                await sock.send(notes)
            except EngineLost:  # the reader notices too, and hears what the engine said before
                return

    async def _read(self, sock: EngineSocket) -> None:
        def hear(frames: Iterator[FromEngine]) -> None:
            before = self._told()
            for frame in frames:
                self._hear(frame)
            if self._told() != before:
                self._changed()

        await sock.read(hear)

    def _told(self) -> tuple[object, ...]:
        """What listeners hear of at once. Free blocks come and go with the tokens, and can wait."""
        now = self.gauges
        return self.hello is None, now.running, now.waiting, now.held, now.total_blocks

    def _hear(self, frame: FromEngine) -> None:
        self._heard_at = monotonic()
        match frame:
            case Results():
                self._take(frame)
            case Hello():
                self._greet(frame)
            case Broken():
                raise EngineLost(frame.detail)

    def _take(self, results: Results) -> None:
        self.gauges = results.gauges
        if results.cached or results.uncached:
            self.cache.change(results.cached, results.uncached)
        runs = self._runs
        for answer in results.answers:
            if run := runs.get(answer.request_id):
                run.hear_answer(answer)
        for step in results.steps:
            if run := runs.get(step.request_id):
                run.on_step(step)
                if step.finish is not None:
                    run.finish(step)

    def _greet(self, hello: Hello) -> None:
        layout = msgspec.structs.replace(hello.layout, tokenizer_digest=self._tokenizer_digest)
        self.hello, self._ever_up = msgspec.structs.replace(hello, layout=layout), True
        self.layout_digest = layout.digest
        log(
            logger,
            "engine up",
            model=hello.model,
            device=hello.device,
            dtype=hello.dtype,
            threads=hello.threads,
            load_s=round(hello.load_s, 3),
            max_sequence_tokens=hello.max_sequence_tokens,
            epoch=self.epoch,
        )

    def _lose(self, lost: EngineLost) -> None:
        """Forget all that this life knew; every request in it has failed."""
        runs, self._runs = self._runs, {}
        self.hello, self.layout_digest = None, ""
        self.gauges = Gauges(step=0)
        self.cache.clear()
        self._notes, self._wake = [], Wake()
        for run in runs.values():
            run.fail(Failure(Code.LOST, f"the engine is lost: {lost}"))
        self._changed()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener.set()

    def _note(self, note: Note) -> None:
        self._notes.append(note)
        self._wake.set()


def _pause_s(deaths: deque[float], lost: EngineLost) -> float:
    """Wait so long before the next start, after one more death. EngineGone if it is one too many.

    `deaths`: when it died lately; written to.
    """
    now = monotonic()
    deaths.append(now)
    while deaths[0] < now - WITHIN_S:
        deaths.popleft()
    if len(deaths) > MOST_RESTARTS:
        detail = f"it died {len(deaths)} times in {now - deaths[0]:.1f} s, the last time: {lost}"
        raise EngineGone(detail) from lost
    pause_s: float = min(FIRST_PAUSE_S * 2 ** (len(deaths) - 1), LONGEST_PAUSE_S)
    fields = {"reason": str(lost), "again_in_s": pause_s}
    logger.error("engine down", extra={"fields": fields})
    return pause_s
