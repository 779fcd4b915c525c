"""The client's side of one WebSocket, on anyio. Knows bytes, not what they mean.

The `websockets` library speaks the protocol (its sans-I/O core); this file moves its bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import anyio
from anyio.abc import ByteStream
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from routing.serving import MAX_FRAME_BYTES

READ_BYTES = 2**18
OPEN_S = 5.0  # to connect and shake hands


class Gone(Exception):
    """The connection could not be made, or is no more. Says why."""


class Socket:
    """An open WebSocket. One task sends, one receives; both raise `Gone` at its end."""

    def __init__(self, stream: ByteStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        self._part = b""  # of a message in several frames

    async def send(self, message: bytes) -> None:
        """Send one binary message, and the pongs that have become due."""
        if self._protocol.state is not State.OPEN:
            raise Gone("the peer is closing the connection")
        self._protocol.send_binary(message)
        try:
            await self._stream.send(b"".join(self._protocol.data_to_send()))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise Gone("the connection broke") from exc

    async def receive(self) -> list[bytes]:
        """The messages completed by what arrived next; at times none."""
        events = self._protocol.events_received()  # what came along with the handshake
        if not events:
            self._protocol.receive_data(await _read(self._stream))
            events = self._protocol.events_received()
        messages = []
        for event in events:
            if not isinstance(event, Frame):
                continue  # the handshake's own response
            match event.opcode:
                case Opcode.BINARY | Opcode.TEXT | Opcode.CONT:
                    self._part += event.data
                    if event.fin:
                        messages.append(self._part)
                        self._part = b""
                case Opcode.CLOSE:
                    raise Gone(f"closed by the peer: {self._protocol.close_code}")
        if self._protocol.parser_exc is not None:
            raise Gone(f"not a WebSocket: {self._protocol.parser_exc}")
        return messages


@asynccontextmanager
async def dial(url: str, headers: dict[str, str]) -> AsyncGenerator[Socket, None]:
    """A WebSocket to `url` (http or https), closed when the block is left. Raises `Gone`."""
    stream = await _connect(url)
    try:
        with anyio.move_on_after(OPEN_S) as scope:
            socket = await _shake_hands(stream, url, headers)
        if scope.cancelled_caught:
            raise Gone(f"no handshake within {OPEN_S:g} s")
        yield socket
    finally:
        with anyio.CancelScope(shield=True):  # does not wait for the peer
            await stream.aclose()


async def _connect(url: str) -> ByteStream:
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        with anyio.fail_after(OPEN_S):
            if parts.scheme == "https":
                return await anyio.connect_tcp(host, parts.port or 443, tls=True)
            return await anyio.connect_tcp(host, parts.port or 80)
    except TimeoutError as exc:
        raise Gone(f"no connection within {OPEN_S:g} s") from exc
    except OSError as exc:
        raise Gone(f"cannot connect: {exc}") from exc


async def _shake_hands(stream: ByteStream, url: str, headers: dict[str, str]) -> Socket:
    parts = urlsplit(url)
    uri = urlunsplit(parts._replace(scheme="wss" if parts.scheme == "https" else "ws"))
    protocol = ClientProtocol(parse_uri(uri), max_size=MAX_FRAME_BYTES)
    request = protocol.connect()
    request.headers.update(headers)
    protocol.send_request(request)
    try:
        await stream.send(b"".join(protocol.data_to_send()))
    except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
        raise Gone("the connection broke") from exc
    while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
        protocol.receive_data(await _read(stream))
    if protocol.handshake_exc is not None:
        raise Gone(_refusal(protocol.handshake_exc)) from protocol.handshake_exc
    return Socket(stream, protocol)


def _refusal(exc: Exception) -> str:
    if isinstance(exc, InvalidStatus):
        return f"refused with status {exc.response.status_code}"
    return f"refused: {exc}"


async def _read(stream: ByteStream) -> bytes:
    try:
        return await stream.receive(READ_BYTES)
    except anyio.EndOfStream as exc:
        raise Gone("closed by the peer") from exc
    except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
        raise Gone("the connection broke") from exc
