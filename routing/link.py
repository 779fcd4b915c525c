"""The client's end of a multiplexed link: many requests over one WebSocket to one peer.

The other end is `link_server`. Each side sends at most one frame a tick of its event loop, or for
what arrived together, however many streams have something to say. A frame also goes out every
`beat_s`, empty if need be, so that both sides notice a silent peer. Losing the connection ends its
streams on both sides.

Of what passes it knows only that a `Fault` tells why a stream ended.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import anyio
import msgspec
from msgspec import Struct

from routing import wire
from routing.errors import Code, Failure
from routing.link_flow import Inbox, Patience, Wake
from routing.link_frames import (
    PATH,
    Batch,
    Cancel,
    Credit,
    Frame,
    LinkStats,
    Open,
    Pace,
    frame_decoder,
)
from routing.link_socket import Gone, Socket, dial
from routing.logs import log
from routing.secret import bearer

logger = logging.getLogger(__name__)

WINDOW = 32  # events that a stream may be ahead of its reader
AT_ONCE = 8  # times as many, where what arrives counts as read: fewer credits to give
FRAME_BYTES = 8 * 2**20  # that requests of one tick fill before another frame is begun
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between tries to connect

Ev = TypeVar("Ev")


@dataclass(slots=True)
class _Reader(Generic[Ev]):
    """Who gets the events of one stream, at the end that opened it."""

    sink: Callable[[Ev | None], None]
    at_once: bool  # whether what arrives counts as read
    window: int  # events that it may be behind
    read: int = 0  # events for which no new credit was given yet


class Call:
    """A stream, at the end that opened it."""

    def __init__(self, hang_up: Callable[[], None]) -> None:
        self._hang_up = hang_up

    def cancel(self) -> None:
        """Hang up: the sink gets nothing more. No effect on a stream that has ended."""
        self._hang_up()


class Link(Generic[Ev]):
    """The client's end: one persistent connection to one peer, and the streams opened over it."""

    def __init__(
        self,
        url: str,
        secret: str,
        events: Any,
        *,
        pace: Pace | None = None,
        window: int = WINDOW,
    ) -> None:
        """Of `events`, the union of all that the peer may answer, `wire.Fault` must be one."""
        self.url = url
        self.stats = LinkStats()
        self._secret = secret
        self._pace = pace or Pace()
        self._window = window
        self._decoder = frame_decoder(events)
        self._encoder = msgspec.msgpack.Encoder()
        self._numbers = itertools.count()
        self._readers: dict[int, _Reader[Ev]] = {}
        self._acts: list[Struct] = []  # that the next frame will say
        self._wake = Wake()
        self._online = anyio.Event()
        self._reason = "not connected yet"

    @property
    def connected(self) -> bool:
        return self._online.is_set()

    @property
    def num_open(self) -> int:
        """Streams opened and not ended."""
        return len(self._readers)

    async def wait_connected(self) -> None:
        await self._online.wait()

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            lasted = await self._connect()
            pause_s = FIRST_PAUSE_S if lasted else min(2 * pause_s, LONGEST_PAUSE_S)
            await anyio.sleep(pause_s * random.uniform(0.5, 1.0))

    def open_nowait(self, request: Struct, sink: Callable[[Ev | None], None]) -> Call:
        """Open a stream. `sink` is called in order with every event, and with None at the end.

        It is called where frames arrive, so it must not wait. It gets `wire.Fault(LOST)`
        before the None when the connection is lost. Failure(LOST) when there is none.
        """
        number = next(self._numbers)
        self._open(number, request, _Reader(sink, at_once=True, window=AT_ONCE * self._window))
        return Call(partial(self._hang_up, number))

    @asynccontextmanager
    async def open(self, request: Struct) -> AsyncGenerator[AsyncIterator[Ev], None]:
        """The events that answer `request`. Leaving the block hangs up."""
        number = next(self._numbers)
        inbox: Inbox[Ev] = Inbox(partial(self._was_read, number, 1))
        self._open(number, request, _Reader(inbox.put, at_once=False, window=self._window))
        try:
            yield inbox
        finally:
            self._hang_up(number)

    def _open(self, number: int, request: Struct, reader: _Reader[Ev]) -> None:
        if not self.connected:
            raise Failure(Code.LOST, f"{self.url}: {self._reason}")
        self._readers[number] = reader
        self._act(Open(number, reader.window, request))

    def _hang_up(self, number: int) -> None:
        if self._readers.pop(number, None) is not None:
            self._act(Cancel(number))

    def _was_read(self, number: int, num_events: int) -> None:
        reader = self._readers.get(number)
        if reader is None:
            return
        reader.read += num_events
        if 2 * reader.read >= reader.window:  # one credit for many events
            self._act(Credit(number, reader.read))
            reader.read = 0

    def _credit_all(self) -> None:
        """Credit for all who read at once, some before it is due: one frame for many streams."""
        for number, reader in self._readers.items():
            if reader.at_once and 4 * reader.read >= reader.window:
                self._act(Credit(number, reader.read))
                reader.read = 0

    def _act(self, act: Struct) -> None:
        self._acts.append(act)
        self._wake.set()

    async def _connect(self) -> bool:
        """Have one connection, from dialling to its loss: whether it lasted a while."""
        before, since = self._reason, None
        try:
            async with dial(self.url + PATH, bearer(self._secret)) as socket:
                since = anyio.current_time()
                log(logger, "link up", url=self.url)
                await self._talk(socket)
        except Gone as gone:
            self._reason = str(gone)
        if since is not None or self._reason != before:  # not for every vain try
            log(logger, "link down", url=self.url, reason=self._reason)
        return since is not None and anyio.current_time() - since > LONGEST_PAUSE_S

    async def _talk(self, socket: Socket) -> None:
        patience = Patience(self._pace.silence_s, self._pace.beat_s)
        self._reason = "closed at this end"
        self._online.set()
        try:
            async with anyio.create_task_group() as tasks:

                async def until_gone(part: Callable[..., Awaitable[None]], *args: object) -> None:
                    try:
                        await part(*args)
                    except Gone as gone:
                        self._reason = str(gone)
                        tasks.cancel_scope.cancel()

                tasks.start_soon(until_gone, self._write, socket)
                tasks.start_soon(until_gone, self._read, socket, patience)
                tasks.start_soon(until_gone, self._beat, patience)
        finally:
            self._lose()

    async def _write(self, socket: Socket) -> None:
        while True:
            await self._wake.wait()
            for frame in self._frames():
                self.stats.frames_sent += 1
                await socket.send(frame)

    def _frames(self) -> Iterator[bytes]:
        """What there is to say; one frame, but for requests too large to go together."""
        acts, self._acts = self._acts, []
        frame: list[msgspec.Raw] = []
        num_bytes = 0
        for act in acts:
            encoded = self._encoder.encode(act)
            if frame and num_bytes + len(encoded) > FRAME_BYTES:
                yield self._encoder.encode(frame)
                frame, num_bytes = [], 0
            frame.append(msgspec.Raw(encoded))
            num_bytes += len(encoded)
        yield self._encoder.encode(frame)

    async def _beat(self, patience: Patience) -> None:
        while True:
            await anyio.sleep(self._pace.beat_s)
            if patience.lost():
                raise Gone(f"silent for {self._pace.silence_s:g} s")
            self._wake.set()

    async def _read(self, socket: Socket, patience: Patience) -> None:
        def hear(message: bytes) -> None:
            patience.sign()
            self.stats.frames_received += 1
            frame = self._decoded(message)
            self._hand_out_ids(frame)
            for batch in frame.batches:
                self._hand_out(batch)

        await socket.read(hear)

    def _decoded(self, message: bytes) -> Frame[Ev]:
        try:
            frame: Frame[Ev] = self._decoder.decode(message)
        except msgspec.DecodeError as exc:
            raise Gone(f"malformed frame of {len(message)} bytes: {exc}") from exc
        if len(frame.streams) != len(frame.ids):
            raise Gone(f"{len(frame.ids)} tokens of {len(frame.streams)} streams in a frame")
        return frame

    def _hand_out_ids(self, frame: Frame[Ev]) -> None:
        """Once a stream and step: what this does more costs every token."""
        readers = self._readers
        for number, token_id in zip(frame.streams, frame.ids, strict=True):
            # looked up each time: a sink may hang up its own or another stream
            reader = readers.get(number)
            if reader is None:
                continue
            try:
                reader.sink(wire.Tokens((token_id,)))  # type: ignore[arg-type]  # an Ev
            except Exception:  # one request's bug must not end the other streams
                logger.exception("a sink failed")
                self._give_up(reader, number)
            if reader.at_once:
                reader.read += 1
                if 2 * reader.read >= reader.window:
                    self._credit_all()

    def _hand_out(self, batch: Batch[Ev]) -> None:
        for event in batch.events:
            # looked up each time: the sink may hang up
            if reader := self._readers.get(batch.id):
                self._give(reader, batch.id, event)
        if batch.ended and (reader := self._readers.pop(batch.id, None)):
            self._give(reader, batch.id, None)
        elif (reader := self._readers.get(batch.id)) and reader.at_once:
            self._was_read(batch.id, len(batch.events))

    def _give(self, reader: _Reader[Ev], number: int, event: Ev | None) -> None:
        try:
            reader.sink(event)
        except Exception:  # as above
            logger.exception("a sink failed")
            if event is not None:
                self._give_up(reader, number)

    def _give_up(self, reader: _Reader[Ev], number: int) -> None:
        """Hang up a stream whose sink has failed; whoever waits for its end may have that."""
        self._hang_up(number)
        self._give(reader, number, None)

    def _lose(self) -> None:
        """End all streams, in a state in which a sink can see that there is no connection."""
        self._online = anyio.Event()
        fault = cast("Ev", wire.Fault(Code.LOST, f"{self.url}: {self._reason}"))
        for number in list(self._readers):
            # looked up each time: a sink may hang up its own or another stream
            if reader := self._readers.get(number):
                self._give(reader, number, fault)
            if reader := self._readers.pop(number, None):
                self._give(reader, number, None)
        self._acts.clear()
