"""A TCP proxy that can stop in the middle: what a bad network does to a transfer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

Act = Literal["cut", "hold"]
Way = Literal["forth", "back"]
Gate: TypeAlias = Callable[[Way, int, int], Awaitable[None]]
BROKEN = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


async def _open(way: Way, connection: int, passed: int) -> None:
    """No gate."""


class Proxy:
    """Passes `forth` bytes from callers and `back` bytes to them, then cuts or holds."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.forth = self.back = 1 << 60
        self.num_back = 0  # bytes that callers got
        self.act: Act = "cut"
        #: awaited before bytes pass: which way, on which connection, after how many
        self.gate: Gate = _open
        self.early = b""  # what a target hears after a caller's first frame, as if it were said
        self.said: list[bytearray] = []  # by the callers, per connection
        self.stopped = anyio.Event()  # it has cut, or holds
        self.closed = anyio.Event()  # one of the two others has closed its connection
        host, _, port = target.rpartition(":")
        self._host, self._port = host, int(port)

    async def handle(self, caller: SocketStream) -> None:
        async with (
            caller,
            await anyio.connect_tcp(self._host, self._port) as target,
            anyio.create_task_group() as tasks,
        ):
            number = len(self.said)
            self.said.append(bytearray())
            scope = tasks.cancel_scope
            tasks.start_soon(self._pass, target, caller, self.back, scope, "back", number)
            tasks.start_soon(self._pass, caller, target, self.forth, scope, "forth", number)

    async def _pass(
        self,
        source: ByteStream,
        sink: ByteStream,
        limit: int,
        scope: anyio.CancelScope,
        way: Way,
        number: int,
    ) -> None:
        passed = 0
        try:
            while passed < limit:
                content = await source.receive(min(limit - passed, 1 << 16))
                if way == "forth":
                    self.said[number] += content
                    content = await self._with_early(content, source, passed)
                await self.gate(way, number, passed)
                await sink.send(content)
                passed += len(content)
                if way == "back":
                    self.num_back += len(content)
        except BROKEN:
            self.closed.set()
            scope.cancel()
        else:
            self.stopped.set()
            if self.act == "cut":
                scope.cancel()

    async def _with_early(self, content: bytes, source: ByteStream, passed: int) -> bytes:
        """The first frame, whole, with what comes early."""
        if passed or not self.early:
            return content
        while len(content) < 4 + int.from_bytes(content[:4], "little"):
            content += await source.receive()
        return content + self.early


@asynccontextmanager
async def tcp_proxy(target: str) -> AsyncGenerator[Proxy, None]:
    """A proxy to `target` (host:port) for the length of the block."""
    proxy = Proxy(target)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    proxy.address = f"127.0.0.1:{port}"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.handle)
        yield proxy
        tasks.cancel_scope.cancel()
