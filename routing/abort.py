"""What an ASGI app may do with its client's connection, and cannot say in ASGI messages.

Drop it at once: uvicorn closes a connection only after what is buffered for it was taken, which for
a client that takes nothing is never. And write more of a streamed body from where no task of the
request runs: a message is sent by a task that has to wake up for it, which costs more than what it
sends. An app finds both in its scope's extensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from routing.heads import BoundedProtocol
from routing.link_bytes import message_frame

EXTENSION = "edgefire.connection"


class AbortableProtocol(BoundedProtocol):
    """uvicorn's HTTP/1.1 protocol, with the extension in every scope."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {
            EXTENSION: {"abort": self.transport.abort, "write": self._write_nowait}
        }

    def _write_nowait(self, scope: Scope, data: bytes) -> bool:
        cycle = self.cycle
        if (
            cycle is None
            or cycle.scope is not scope  # another request's turn on this connection
            or not cycle.chunked_encoding  # None before the response has started
            or cycle.response_complete
            or cycle.disconnected
            or cycle.flow.write_paused
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))  # RFC 9112, 7.1
        return True


class PromptProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, with the extension's `write` in every scope."""

    _paused = False  # the client is slow to read

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # the handshake is good, and the app about to start
            extensions = cast("dict[str, Any]", self.scope["extensions"])
            extensions[EXTENSION] = {"write": self._write_nowait}

    def _write_nowait(self, scope: Scope, data: bytes) -> bool:
        if self._paused or self.close_sent or self.transport.is_closing():
            return False
        self.transport.write(message_frame(data))
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused = False


def abort_of(scope: Scope) -> Callable[[], None]:
    """What drops the connection of this request. The app is told as if its client had hung up."""
    return cast("Callable[[], None]", _extension(scope)["abort"])


def write_of(scope: Scope) -> Callable[[bytes], bool]:
    """What sends bytes, not none, as more of the body of a streamed response that has started.

    Of a WebSocket that was accepted: as a binary message. It never waits: False, and nothing is
    sent, where that would take an ASGI message, as when the client is slow to read or has left.
    """
    return partial(_extension(scope)["write"], scope)


def _extension(scope: Scope) -> dict[str, Any]:
    extensions: dict[str, dict[str, Any]] = scope["extensions"]
    return extensions[EXTENSION]
