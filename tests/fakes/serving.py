"""ASGI apps on real sockets: uvicorn as the fleet's processes start it, on port 0."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext

import anyio
from anyio.abc import TaskGroup
from starlette.types import ASGIApp

from routing.serving import address, listening_socket, server


class Serving:
    """A server in a task of its own, which can be stopped at any time."""

    def __init__(self, app: ASGIApp, listener: socket.socket | None = None) -> None:
        self._listener = listener or listening_socket("127.0.0.1", 0)
        self.url = address(self._listener)
        self._server = server(app)
        self._server.capture_signals = nullcontext  # type: ignore[method-assign]  # they are pytest's
        self._stopped = anyio.Event()

    async def start(self, tasks: TaskGroup) -> None:
        """Return when it answers."""
        tasks.start_soon(self._run)
        with anyio.fail_after(20):
            while not self._server.started:
                await anyio.sleep(0.005)

    async def stop(self) -> None:
        """Cut its connections; return when it is gone."""
        self._server.stop()
        with anyio.fail_after(20):
            await self._stopped.wait()

    async def _run(self) -> None:
        await self._server.serve([self._listener])
        self._stopped.set()


@asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket | None = None) -> AsyncGenerator[str, None]:
    """The URL at which `app` answers for the length of the block."""
    running = Serving(app, listener)
    async with anyio.create_task_group() as tasks:
        await running.start(tasks)
        yield running.url
        await running.stop()
