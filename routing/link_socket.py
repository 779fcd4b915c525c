"""The client's side of one WebSocket. Knows bytes, not what they mean.

Messages are handed out where they arrive, with no task in between: waking one for each would cost
more than what it does. The `websockets` library speaks the protocol (its sans-I/O core), but for
what happens once a token: see `link_bytes`.
"""

from __future__ import annotations

import asyncio  # noqa: TID251  a protocol, for it hears without a task
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from socket import SOCK_STREAM
from typing import cast
from urllib.parse import urlsplit, urlunsplit

import anyio
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from routing.arrival import hand_out
from routing.link_bytes import is_message, small_message, span
from routing.serving import MAX_FRAME_BYTES

OPEN_S = 5.0  # to connect, at however many addresses, and as long again to shake hands


class Gone(Exception):
    """The connection could not be made, or is no more. Says why."""


class Socket(asyncio.Protocol):
    """An open WebSocket. One task sends, one waits in `read`; both raise `Gone` at its end."""

    def __init__(self, protocol: ClientProtocol) -> None:
        self._protocol = protocol
        self._received = bytearray()  # of a frame that is not whole yet
        self._part = b""  # of a message in several frames
        self._plain = False  # hands are shaken, and no message is in part here
        self._early: list[bytes] = []  # messages that nobody has asked for yet
        self._hear: Callable[[bytes], None] = self._early.append
        self._gone: Gone | None = None
        self._answered = anyio.Event()  # the handshake is, one way or the other
        self._over = anyio.Event()
        self._writable = anyio.Event()
        self._writable.set()

    async def shake_hands(self, headers: dict[str, str]) -> None:
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        self._flush()
        await self._answered.wait()
        if self._gone is not None:
            raise self._gone

    async def send(self, message: bytes) -> None:
        """Send one binary message, and wait until the kernel has taken it."""
        if self._gone is not None:
            raise self._gone
        if self._protocol.state is not State.OPEN:
            raise Gone("the peer is closing the connection")
        self._protocol.send_binary(message)
        self._flush()
        await self._writable.wait()

    async def read(self, hear: Callable[[bytes], None]) -> None:
        """Have `hear` called with every message until the end, which raises `Gone`.

        It is called where messages arrive, so it must not wait. It may raise `Gone` itself.
        """
        self._hear = hear
        for message in self._early:
            hear(message)
        await self._over.wait()
        assert self._gone is not None
        raise self._gone

    def abort(self) -> None:
        """Close at once, waiting neither for the peer nor for what was not sent yet."""
        self._give_up(Gone("closed at this end"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up(Gone("the connection broke" if exc else "closed by the peer"))

    def pause_writing(self) -> None:
        self._writable = anyio.Event()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self._gone is not None:
            return
        try:
            if not self._received and self._plain and (message := small_message(data)) is not None:
                hand_out(self._hear, message)
                return
            self._received += data
            if self._protocol.state is State.CONNECTING:
                self._take_answer()
            if self._protocol.state is not State.CONNECTING:
                self._take_frames()
        except Gone as gone:
            self._give_up(gone)

    def _take_answer(self) -> None:
        """The handshake's, a line at a time: what follows it is none of the library's business."""
        while self._received and self._protocol.state is State.CONNECTING:
            end = self._received.find(b"\n") + 1 or len(self._received)
            self._protocol.receive_data(self._taken(end))
            if (refusal := self._protocol.handshake_exc) is not None:
                raise Gone(_told(refusal)) from refusal
        if self._protocol.state is not State.CONNECTING:
            self._protocol.events_received()  # the answer
            self._plain = True
            self._answered.set()

    def _take_frames(self) -> None:
        try:
            while (found := span(self._received)) is not None:
                begin, end = found
                if end - begin > MAX_FRAME_BYTES:
                    raise Gone(f"a frame of {end - begin} bytes")
                if len(self._received) < end:
                    return
                if self._plain and is_message(self._received):
                    hand_out(self._hear, self._taken(end)[begin:])
                else:
                    self._take_odd_frame(self._taken(end))
        except ValueError as exc:
            raise Gone(f"not a WebSocket: {exc}") from exc

    def _take_odd_frame(self, frame: bytes) -> None:
        """Part of a message, or one of those that keep a connection and end it."""
        self._protocol.receive_data(frame)
        self._flush()  # a pong
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            match event.opcode:
                case Opcode.BINARY | Opcode.TEXT | Opcode.CONT:
                    self._part += event.data
                    self._plain = event.fin
                    if event.fin:
                        message, self._part = self._part, b""
                        hand_out(self._hear, message)
                case Opcode.CLOSE:
                    raise Gone(f"closed by the peer: {self._protocol.close_rcvd}")
        if self._protocol.parser_exc is not None:
            raise Gone(f"not a WebSocket: {self._protocol.parser_exc}")

    def _taken(self, end: int) -> bytes:
        taken = bytes(self._received[:end])
        del self._received[:end]
        return taken

    def _flush(self) -> None:
        self._transport.write(b"".join(self._protocol.data_to_send()))

    def _give_up(self, gone: Gone) -> None:
        """For the first reason there is."""
        if self._gone is None:
            self._gone = gone
            self._transport.abort()
            self._answered.set()
            self._over.set()
            self._writable.set()


@asynccontextmanager
async def dial(url: str, headers: dict[str, str]) -> AsyncGenerator[Socket, None]:
    """A WebSocket to `url` (http or https), closed when the block is left. Raises `Gone`."""
    socket = await _connect(url)
    try:
        with anyio.move_on_after(OPEN_S) as scope:
            await socket.shake_hands(headers)
        if scope.cancelled_caught:
            raise Gone(f"no handshake within {OPEN_S:g} s")
        yield socket
    finally:
        socket.abort()


async def _connect(url: str) -> Socket:
    """At the first of the host's addresses that answers; each has its part of the time."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    uri = parse_uri(urlunsplit(parts._replace(scheme="wss" if secure else "ws")))
    context = ssl.create_default_context() if secure else None
    loop = asyncio.get_running_loop()
    try:
        with anyio.fail_after(OPEN_S):
            found = await loop.getaddrinfo(uri.host, uri.port, type=SOCK_STREAM)
    except (OSError, TimeoutError) as exc:
        raise Gone(f"cannot find {uri.host}: {exc}") from exc
    gone = Gone(f"{uri.host} has no address")
    for *_, address in found:
        try:
            with anyio.fail_after(OPEN_S / len(found)):
                _, socket = await loop.create_connection(
                    lambda: Socket(ClientProtocol(uri, max_size=MAX_FRAME_BYTES)),
                    str(address[0]),
                    uri.port,
                    ssl=context,
                    server_hostname=uri.host if secure else None,
                )
            return socket
        except TimeoutError:
            gone = Gone(f"no connection within {OPEN_S:g} s")
        except OSError as exc:
            gone = Gone(f"cannot connect: {exc}")
    raise gone


def _told(exc: Exception) -> str:
    if isinstance(exc, InvalidStatus):
        return f"refused with status {exc.response.status_code}"
    return f"refused: {exc}"
