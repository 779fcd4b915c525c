"""The server's end of multiplexed links: a route, and one task for every stream opened over it.

The other end is `link`. A stream's events go out as long as its client has given credit for them;
beyond that they wait here, where `Tokens` merge into one, so a slow reader costs a longer event
and not a longer queue, and a reader that has stopped loses its stream after `stall_s`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Generic, TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from routing import wire
from routing.abort import write_of
from routing.arrival import afterwards
from routing.errors import Code, Failure
from routing.link_flow import Outbox, Patience, Wake
from routing.link_frames import (
    PATH,
    Batch,
    Cancel,
    Credit,
    Frame,
    LinkStats,
    Open,
    Pace,
    acts_decoder,
)
from routing.secret import NeedsSecret

logger = logging.getLogger(__name__)

Req = TypeVar("Req")
Ev = TypeVar("Ev")


class Stream(Generic[Req, Ev]):
    """One request, at the end that answers it.

    `send` takes an event and never waits: all that is sent in one tick, on all streams, goes out as
    one frame; so does, without waiting for the tick's end, all that is sent on one `arrival`.
    """

    __slots__ = ("request", "send")

    def __init__(self, request: Req, put: Callable[[Ev], None]) -> None:
        self.request = request
        self.send = put


Serve = Callable[[Stream[Any, Any]], Awaitable[None]]


def link_route(
    serve: Serve,
    *,
    requests: Any,
    secret: str,
    pace: Pace | None = None,
    stats: LinkStats | None = None,
    lasting: type[Any] = NoneType,
) -> WebSocketRoute:
    """A route at /v1/link whose streams are answered by `serve`.

    Each stream has a task of its own, cancelled when its client hangs up or the connection is lost.
    Returning from `serve` ends the stream. A `Failure` is told to the client as it is; any other
    exception is logged, and told as INTERNAL. `requests` is the union of what may be asked; those
    that are `lasting` are no work, and not counted in `stats.num_open`.
    """
    decoder = acts_decoder(requests)
    counts = stats or LinkStats()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        connection = _Connection(websocket, serve, pace or Pace(), counts, lasting)
        await connection.run(decoder)

    return WebSocketRoute(PATH, endpoint, middleware=[Middleware(NeedsSecret, secret=secret)])


class _Misuse(Exception):
    """A client did what no client of ours does."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A stream being answered: what waits for its client, and how to stop its task."""

    outbox: Outbox[Any]
    scope: anyio.CancelScope
    counts: bool  # as work


class _Connection:
    """One client, and the streams it has opened."""

    def __init__(
        self,
        websocket: WebSocket,
        serve: Serve,
        pace: Pace,
        stats: LinkStats,
        lasting: type[Any],
    ) -> None:
        self._websocket = websocket
        self._write_nowait = write_of(websocket.scope)
        self._serve = serve
        self._pace = pace
        self._period_s = min(pace.beat_s, pace.stall_s / 4)
        self._stats = stats
        self._lasting = lasting
        self._encoder = msgspec.msgpack.Encoder()
        self._answers: dict[int, _Answer] = {}
        self._news: dict[int, None] = {}  # streams with something to say, in the order they had it
        self._unsent: bytes | None = None  # a frame that could not be written at once
        self._wake = Wake()  # of the task that writes it
        self._silence = Patience(pace.silence_s, self._period_s)

    async def run(self, decoder: msgspec.msgpack.Decoder[list[Any]]) -> None:
        """Return when the client is gone and the tasks of all its streams have ended."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, tasks.cancel_scope)
                tasks.start_soon(self._beat, tasks.cancel_scope)
                try:
                    while (frame := await self._next_frame()) is not None:
                        for act in decoder.decode(frame):
                            self._obey(act, tasks)
                except (msgspec.DecodeError, _Misuse) as exc:
                    self._warn("malformed link frame", str(exc))
                tasks.cancel_scope.cancel()
        finally:
            for number in list(self._answers):
                self._forget(number)

    async def _next_frame(self) -> bytes | None:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        self._silence.sign()
        self._stats.frames_received += 1
        frame: bytes | None = message.get("bytes")
        if frame is None:
            raise _Misuse("text, where MessagePack was expected")
        return frame

    def _obey(self, act: Open[Any] | Cancel | Credit, tasks: TaskGroup) -> None:
        match act:
            case Open():
                self._begin(act, tasks)
            case Cancel():
                if answer := self._forget(act.id):
                    answer.scope.cancel()
            case Credit():
                if answer := self._answers.get(act.id):
                    answer.outbox.grant(act.num_events)

    def _begin(self, opened: Open[Any], tasks: TaskGroup) -> None:
        if opened.id in self._answers:
            raise _Misuse(f"stream {opened.id} is open already")
        patience = Patience(self._pace.stall_s, self._period_s)
        outbox: Outbox[Any] = Outbox(opened.id, opened.window, patience, self._has_news)
        counts = not isinstance(opened.request, self._lasting)
        answer = _Answer(outbox, anyio.CancelScope(), counts)
        self._answers[opened.id] = answer
        self._stats.num_open += counts
        tasks.start_soon(self._answer, Stream(opened.request, outbox.put), answer)

    def _forget(self, number: int) -> _Answer | None:
        answer = self._answers.pop(number, None)
        if answer is not None:
            self._stats.num_open -= answer.counts
        return answer

    async def _answer(self, stream: Stream[Any, Any], answer: _Answer) -> None:
        with answer.scope:
            try:
                await self._serve(stream)
            except Failure as failure:
                stream.send(wire.Fault(failure.code, failure.detail, failure.retry_after_s))
            except Exception:  # one request's bug must not end the other streams
                logger.exception("a stream failed")
                stream.send(wire.Fault(Code.INTERNAL, "an error here, which the log describes"))
        answer.outbox.end()

    def _has_news(self, number: int) -> None:
        if not self._news:  # else `_say_news` is due already
            afterwards(self._say_news)
        self._news[number] = None

    def _say_news(self) -> None:
        """All there are as one frame. While another waits for room, they wait too."""
        if self._unsent is None:
            frame = self._gather()
            if frame.streams or frame.batches:
                self._say(frame)

    def _say(self, frame: Frame[Any]) -> None:
        """Written with no task in between, where that takes no waiting."""
        encoded = self._encoded(frame)
        if not self._write_nowait(encoded):
            self._unsent = encoded
            self._wake.set()

    def _encoded(self, frame: Frame[Any]) -> bytes:
        self._stats.frames_sent += 1
        return self._encoder.encode(frame)

    async def _write(self, scope: anyio.CancelScope) -> None:
        """Send what had to wait."""
        while True:
            await self._wake.wait()
            while self._unsent is not None:
                try:
                    await self._websocket.send_bytes(self._unsent)
                # RuntimeError: uvicorn's word for a connection that is closing but has not said so
                except (WebSocketDisconnect, RuntimeError):
                    scope.cancel()
                    return
                self._unsent = self._encoded(self._gather()) if self._news else None

    def _gather(self) -> Frame[Any]:
        streams: list[int] = []
        ids: list[int] = []
        batches: list[Batch[Any]] = []
        news, self._news = self._news, {}
        for number in news:
            answer = self._answers.get(number)
            if answer is None:
                continue
            token_id = answer.outbox.lone_id()
            if token_id is not None:
                streams.append(number)
                ids.append(token_id)
            elif batch := answer.outbox.batch():
                batches.append(batch)
                if batch.ended:
                    self._forget(number)
        return Frame(streams, ids, batches)

    async def _beat(self, scope: anyio.CancelScope) -> None:
        while True:
            await anyio.sleep(self._period_s)
            if self._silence.lost():
                self._warn("link lost", f"silent for {self._pace.silence_s:g} s")
                scope.cancel()
                return
            for answer in self._answers.values():
                if answer.outbox.stalled():
                    detail = f"nothing was read for {self._pace.stall_s:g} s"
                    answer.outbox.cut(wire.Fault(Code.ABORTED, detail))
                    answer.scope.cancel()
            if self._unsent is None:  # else the client hears us when it reads on
                self._say(self._gather())

    def _warn(self, event: str, reason: str) -> None:
        fields = {"client": str(self._websocket.client), "reason": reason}
        logger.warning(event, extra={"fields": fields})
