"""An ASGI app on a real socket, for the length of a block."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from starlette.types import ASGIApp

from routing.serving import address, listening_socket, server


@asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket | None = None) -> AsyncGenerator[str, None]:
    """The URL at which `app` answers; uvicorn as the fleet's processes start it, on port 0."""
    listener = listener or listening_socket("127.0.0.1", 0)
    running = server(app)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.serve, [listener])
        with anyio.fail_after(20):
            while not running.started:
                await anyio.sleep(0.005)
        yield address(listener)
        running.should_exit = True
