"""A TCP connection for KV: small messages, one large file, and a bound on every wait for the peer.

Everything waits in the event loop and moves in short turns, so tokens of other requests are not
held up. Fails with OSError, of which TimeoutError is one. Knows nothing of what it carries.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio.lowlevel import checkpoint
from msgspec import Struct

STALL_S = 10.0  # a peer that neither sends nor takes a byte for so long is gone
MAX_MESSAGE_BYTES = 1 << 16
# One write a chunk. Receiving into a mapping of the file was slower (64 MiB over loopback, n = 12:
# median 113 ms against 76, 2026-11-23), and makes of a full disk a signal instead of an error.
CHUNK_BYTES = 1 << 20
_PREFIX_BYTES = 4


class Connection:
    """Owns `sock` in all but closing it."""

    def __init__(self, sock: socket.socket, *, stall_s: float = STALL_S) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._stall_s = stall_s

    async def send(self, content: bytes) -> None:
        unsent = memoryview(content)
        while unsent:
            await self._wait(anyio.wait_writable)
            try:
                unsent = unsent[self._sock.send(unsent) :]
            except BlockingIOError:
                continue

    async def send_message(self, message: Struct) -> None:
        body = msgspec.msgpack.encode(message)
        await self.send(len(body).to_bytes(_PREFIX_BYTES, "little") + body)

    async def send_file(
        self, handle: int, begin: int, end: int, moved: Callable[[], None] = lambda: None
    ) -> None:
        """These bytes of an open file, without a copy in this process. `moved` is called whenever
        some have been taken."""
        sent = begin
        while sent < end:
            room = min(CHUNK_BYTES, end - sent)
            try:
                count = os.sendfile(self._sock.fileno(), handle, sent, room)
            except BlockingIOError:
                await self._wait(anyio.wait_writable)
                continue
            await checkpoint()  # others have their turn
            if not count:
                raise OSError(f"the file ends after {sent} of {end} bytes")
            sent += count
            moved()

    async def receive_message(self, kind: Any, *, within_s: float | None = None) -> Any:
        """The next message, of the type or union `kind`. DecodeError if it is another.

        `within_s`: how long its beginning may take, if not what is usual.
        """
        size = int.from_bytes(await self.receive_exactly(_PREFIX_BYTES, within_s), "little")
        if size > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
        return msgspec.msgpack.decode(await self.receive_exactly(size), type=kind)

    async def receive_exactly(self, num_bytes: int, within_s: float | None = None) -> bytes:
        content = bytearray(num_bytes)
        received = 0
        while received < num_bytes:
            received += await self._receive_into(memoryview(content)[received:], within_s)
        return bytes(content)

    async def receive_whole(self, room: memoryview) -> None:
        """As many bytes as there is room for."""
        received = 0
        while received < len(room):
            try:
                received += await self._receive_into(room[received : received + CHUNK_BYTES])
            except OSError as exc:
                raise OSError(f"{exc} after {received} of {len(room)} bytes") from exc

    async def receive_file(self, path: Path, num_bytes: int) -> None:
        """The next `num_bytes`, as a new file at `path`. What a failure leaves of it stays."""
        chunk = memoryview(bytearray(min(CHUNK_BYTES, num_bytes)))
        received = 0
        with path.open("xb") as file:
            while received < num_bytes:
                room = chunk[: num_bytes - received]
                try:
                    count = await self._receive_into(room)
                except OSError as exc:
                    raise OSError(f"{exc} after {received} of {num_bytes} bytes") from exc
                file.write(room[:count])
                received += count

    async def _receive_into(self, room: memoryview, within_s: float | None = None) -> int:
        """At least one byte."""
        while True:
            try:
                count = self._sock.recv_into(room)
            except BlockingIOError:
                await self._wait(anyio.wait_readable, within_s)
                continue
            await checkpoint()  # others have their turn
            if not count:
                raise ConnectionError("the peer closed the connection")
            return count

    async def _wait(
        self, ready: Callable[[socket.socket], Awaitable[None]], within_s: float | None = None
    ) -> None:
        limit_s = self._stall_s if within_s is None else within_s
        with anyio.move_on_after(limit_s):
            await ready(self._sock)
            return
        raise TimeoutError(f"the peer neither sent nor took a byte for {limit_s:g} s")


async def dial(host: str, port: int) -> socket.socket:
    """A connected socket."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        try:
            sock.connect(where)
        except BlockingIOError:  # under way
            with anyio.fail_after(STALL_S):
                await anyio.wait_writable(sock)
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
    except BaseException:  # being cancelled, most of all
        sock.close()
        raise
    return sock
