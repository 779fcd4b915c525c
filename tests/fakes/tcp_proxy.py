"""A TCP proxy that can stop in the middle: what a bad network does to a transfer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Literal

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

Act = Literal["cut", "hold"]
BROKEN = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


class Proxy:
    """Passes `forth` bytes from callers and `back` bytes to them, then cuts or holds."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.forth = self.back = 1 << 60
        self.num_back = 0  # bytes that callers got
        self.act: Act = "cut"
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
            tasks.start_soon(self._pass, target, caller, self.back, tasks.cancel_scope, self._count)
            tasks.start_soon(self._pass, caller, target, self.forth, tasks.cancel_scope)

    def _count(self, num_bytes: int) -> None:
        self.num_back += num_bytes

    async def _pass(
        self,
        source: ByteStream,
        sink: ByteStream,
        limit: int,
        scope: anyio.CancelScope,
        passed: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        try:
            while limit:
                content = await source.receive(min(limit, 1 << 16))
                await sink.send(content)
                passed(len(content))
                limit -= len(content)
        except BROKEN:
            self.closed.set()
            scope.cancel()
        else:
            self.stopped.set()
            if self.act == "cut":
                scope.cancel()


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
