"""A worker's end of its engine process: start it, leave it notes, hand out what it answers.

The engine is a child that talks over a socket pair (`infire.notes`), one frame a step. Everything
here runs in the event loop and nothing waits for a token: what a step brings is handed to each
request's own `hear`, synchronously. Knows no request of the wire and no other worker.
"""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import uuid
from collections import deque
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio.abc import Process, UNIXSocketStream

from infire.notes import (
    Adopted,
    Answer,
    Broken,
    Drop,
    Export,
    Exported,
    FromEngine,
    Gauges,
    Hello,
    Note,
    Notes,
    Refused,
    Results,
    Submit,
)
from infire.request import Sequence as EngineSequence
from infire.request import Step
from routing.errors import Code, Failure
from routing.link_flow import Wake
from routing.logs import log

logger = logging.getLogger(__name__)

Hear = Callable[[Step | Adopted | Failure], None]  # a step that finishes, or a failure, is the last

PREFIX_BYTES = 4
READ_BYTES = 1 << 18
FRESH_S = 5.0  # an engine that has said nothing for longer is stuck
STOP_S = 3.0  # for an engine to end by itself once its socket is closed
MOST_RESTARTS, RESTARTS_WITHIN_S = 5, 60.0
PAUSE_S = 0.2  # before the first restart; doubles


class EngineGone(Exception):
    """The engine could not start, or has ended too often to go on. Says why."""


class EngineLink:
    """One engine after another, should one end; at most one at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._hears: dict[str, Hear] = {}
        self._exports: dict[str, Callable[[int | Failure | None], None]] = {}
        self._notes: list[Note] = []
        self._wake = Wake()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._heard_at = -math.inf
        self._last_words = ""
        self._num_requests = 0
        self.listeners: set[Wake] = set()  # set whenever something has changed
        self.hello: Hello | None = None  # None: not up
        self.gauges = Gauges(step=0)
        self.epoch = ""  # of the life of the engine

    @property
    def fresh(self) -> bool:
        """Whether the engine is up, and said something lately."""
        return self.hello is not None and anyio.current_time() - self._heard_at < FRESH_S

    def new_id(self, request_id: str) -> str:
        """An id that no other request of this engine ever had: a late word reaches nobody else."""
        self._num_requests += 1
        return f"{request_id}#{self._num_requests}"

    def submit(
        self, sequence: EngineSequence, hear: Hear, kv_path: str | None = None, num_adopted: int = 0
    ) -> None:
        """Run `sequence`; `hear` gets its steps. Failure(UNAVAILABLE) when there is no engine."""
        self._must_be_up()
        self._hears[sequence.request_id] = hear
        self._note(Submit(sequence, kv_path, num_adopted))

    def drop(self, request_id: str) -> None:
        """Forget a request at the next step boundary; nothing more is heard of it."""
        self._hears.pop(request_id, None)
        if self.hello is not None:
            self._note(Drop(request_id))

    async def export(self, request_id: str, path: str) -> int | None:
        """Have the KV of a held sequence written to `path`; its size, None if it is not held."""
        self._must_be_up()
        done = anyio.Event()
        outcome: list[int | Failure | None] = []

        def hear(word: int | Failure | None) -> None:
            outcome.append(word)
            done.set()

        self._exports[request_id] = hear
        self._note(Export(request_id, path))
        try:
            await done.wait()
        finally:
            self._exports.pop(request_id, None)
        if isinstance(outcome[0], Failure):
            raise outcome[0]
        return outcome[0]

    async def run(self) -> None:
        """Keep an engine until cancelled. Raises EngineGone when that makes no sense any more."""
        ends: deque[float] = deque(maxlen=MOST_RESTARTS)
        pause_s = PAUSE_S
        while True:
            self._last_words = ""
            began = anyio.current_time()
            try:
                ever_up = await self._one_life()
            finally:
                self._lose()
            why = self._last_words or "the engine's process ended"
            logger.error("engine down", extra={"fields": {"reason": why}})
            if not ever_up:
                raise EngineGone(why)
            ends.append(anyio.current_time())
            if len(ends) == MOST_RESTARTS and ends[-1] - ends[0] < RESTARTS_WITHIN_S:
                raise EngineGone(f"{MOST_RESTARTS} times in {RESTARTS_WITHIN_S:g} s: {why}")
            if anyio.current_time() - began > RESTARTS_WITHIN_S:
                pause_s = PAUSE_S
            await anyio.sleep(pause_s)
            pause_s *= 2

    async def _one_life(self) -> bool:
        """Start an engine and talk with it to its end: whether it was ever up."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await anyio.open_process(
                [*self._command, "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=None,
                stderr=None,
                pass_fds=[theirs.fileno()],
            )
        stream = await UNIXSocketStream.from_socket(ours)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, stream)
                await self._read(stream)
                tasks.cancel_scope.cancel()
        finally:
            ever_up = self.hello is not None
            self.hello = None
            with anyio.CancelScope(shield=True):
                await stream.aclose()  # which ends the engine
                await _reap(process)
        return ever_up

    async def _write(self, stream: UNIXSocketStream) -> None:
        """One frame for all notes of a tick."""
        while True:
            await self._wake.wait()
            notes, self._notes = tuple(self._notes), []
            body = self._encode(Notes(notes))
            try:
                await stream.send(len(body).to_bytes(PREFIX_BYTES, "little") + body)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return  # the reader notices, too

    async def _read(self, stream: UNIXSocketStream) -> None:
        received = bytearray()
        while True:
            try:
                received += await stream.receive(READ_BYTES)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            begin = 0
            while len(received) - begin >= PREFIX_BYTES:
                body = begin + PREFIX_BYTES
                end = body + int.from_bytes(received[begin:body], "little")
                if end > len(received):
                    break
                self._hear(self._decode(memoryview(received)[body:end]))
                begin = end
            del received[:begin]

    def _hear(self, message: FromEngine) -> None:
        self._heard_at = anyio.current_time()
        match message:
            case Results():
                self.gauges = message.gauges
                for step in message.steps:
                    self._tell(step.request_id, step, last=step.finish is not None)
                for answer in message.answers:
                    self._hear_answer(answer)
            case Hello():
                self.epoch = uuid.uuid4().hex
                self.hello = message
                log(
                    logger,
                    "engine up",
                    model=message.model,
                    device=message.device,
                    dtype=message.dtype,
                    threads=message.threads,
                    load_s=round(message.load_s, 3),
                    max_sequence_tokens=message.max_sequence_tokens,
                )
            case Broken():
                self._last_words = message.detail
        for listener in self.listeners:
            listener.set()

    def _hear_answer(self, answer: Answer) -> None:
        match answer:
            case Adopted(request_id):
                self._tell(request_id, answer, last=False)
            case Exported(request_id, num_bytes):
                if hear := self._exports.get(request_id):
                    hear(num_bytes)
            case Refused(request_id, code, detail):
                failure = Failure(Code(code), detail)
                if hear := self._exports.get(request_id):
                    hear(failure)
                self._tell(request_id, failure, last=True)

    def _tell(self, request_id: str, word: Step | Adopted | Failure, *, last: bool) -> None:
        hear = self._hears.pop(request_id, None) if last else self._hears.get(request_id)
        if hear is None:
            return  # dropped while the word was on its way
        try:
            hear(word)
        except Exception:  # one request's bug must not end the others
            logger.exception("a request could not take what it was told")

    def _lose(self) -> None:
        """Tell everybody who waits that the engine is gone."""
        self._notes.clear()
        self.gauges = Gauges(step=self.gauges.step)
        failure = Failure(Code.LOST, self._last_words or "the engine's process ended")
        for request_id in list(self._hears):
            self._tell(request_id, failure, last=True)
        for hear in list(self._exports.values()):
            hear(failure)
        for listener in self.listeners:
            listener.set()

    def _must_be_up(self) -> None:
        if self.hello is None:
            raise Failure(Code.UNAVAILABLE, "the engine is not up", retry_after_s=1.0)

    def _note(self, note: Note) -> None:
        self._notes.append(note)
        self._wake.set()


async def _reap(process: Process) -> None:
    """Return when the process is gone: killed, if it does not end by itself in time."""
    with anyio.move_on_after(STOP_S):
        await process.wait()
        return
    process.kill()
    await process.wait()
