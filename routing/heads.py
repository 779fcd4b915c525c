"""uvicorn's HTTP/1.1 protocol, with bounds on what is taken of a client before it has asked.

A head is a request's line and headers. Until it is whole no key can be looked at, and uvicorn takes
as much of it as comes, for as long as it comes. Knows no app.
"""

from __future__ import annotations

import asyncio  # noqa: TID251  uvicorn's own
import re
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MOST_HEAD_BYTES = 64 * 2**10  # and what else comes with the last of them
HEAD_S = 60.0  # from a connection, or from a head's first byte, to its last
_NAME = b"\r\nupgrade:"
# To something else than a WebSocket, as Java's client asks on every plain connection (h2c).
_OTHER_UPGRADE = re.compile(rb"\r\nupgrade(?=:)(?![^\r]*websocket)", re.IGNORECASE)


class BoundedProtocol(HttpToolsProtocol):
    """A client whose head is too long is refused, and hung up on where it takes too long."""

    _in_head = False
    _in_body = False
    _num_bytes = 0  # since the last of a body, or the end of a head
    _late: asyncio.TimerHandle | None = None
    _unread = b""  # of a head: a line that has to be whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if not self._in_body:
            data, self._unread = _parted(self._unread + data)
            data = _without_upgrade(data)
        super().data_received(data)
        if (self._in_head or self._unread) and self._late is None:
            self._wait_head()
        if self._num_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._num_bytes = False, True, 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._num_bytes = False, 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        conn = cast("WebSocketsSansIOProtocol", self.transport.get_protocol()).conn
        if conn.handshake_exc is not None and not self.transport.is_closing():
            # uvicorn would wait for the rest of a request that was no good handshake.
            self.transport.write(b"".join(conn.data_to_send()))
            self.transport.close()

    def _wait_head(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"A request's head may have {MOST_HEAD_BYTES} bytes.")
        else:
            self.transport.abort()  # what follows a body, with an answer under way


def _parted(data: bytes) -> tuple[bytes, bytes]:
    """What may be read now, and what not yet: the beginning of a line that may say Upgrade."""
    if b"\r\n\r\n" in data:
        return data, b""
    at = data.rfind(b"\r\n")
    if at < 0 or not _NAME.startswith(data[at : at + len(_NAME)].lower()):
        at = len(data) - data.endswith(b"\r")
    return data[:at], data[at:]


def _without_upgrade(data: bytes) -> bytes:
    """A request that is answered as if it asked for nothing but an answer, as HTTP allows.

    llhttp would take what follows the head for another protocol's, and the body was lost.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    if b"upgrade:" not in head.lower():
        return data
    return _OTHER_UPGRADE.sub(b"\r\nx-upgrade", head + end) + rest
