"""How every server process of the fleet listens, serves and stops. Knows nothing of the app."""

from __future__ import annotations

import asyncio  # noqa: TID251  uvicorn's own
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from routing.abort import AbortableProtocol, PromptProtocol

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20  # of one WebSocket message: a prompt of 128k ids takes 0.6 MB
DEAD_PEER_S = 90  # a peer that takes nothing of what was sent for so long is disconnected
KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections: else both ends race
DATE_S = 1.0  # as exact as an HTTP date is
DRAIN_S = 2  # connections may close by themselves for this long after a signal
PARENT_CHECK_S = 0.5
# New objects before the collector looks at them, and times 20 at older ones. A server makes a few
# for every token and drops them at once: with Python's 700 it would look for cycles every step.
COLLECT_EVERY = 50_000
STOP_S = 4.5  # after which a process that was told to stop is gone, whatever it still does


def listening_socket(host: str, port: int, fd: int | None = None) -> socket.socket:
    """The listening socket inherited as `fd`; without one, a new one on host and port (0: any)."""
    if fd is not None:
        listener = socket.socket(fileno=fd)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; its connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_S)
    return listener


def address(listener: socket.socket) -> str:
    """Where others reach the process that listens here, as http://host:port."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: ASGIApp) -> Server:
    """A uvicorn server set up for links: large frames, no compression, logs left alone.

    WebSocket pings are off: links have a heartbeat of their own, which also ends the streams of a
    peer that is stopped with data still buffered for it.
    """
    return Server(
        uvicorn.Config(
            app,
            loop="auto",  # uvloop where it is installed
            http=AbortableProtocol,
            ws=PromptProtocol,
            ws_max_size=MAX_FRAME_BYTES,
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who may say where a client is from, the edge decides itself
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
        )
    )


def serve_app(app: ASGIApp, *, host: str, port: int, fd: int | None = None) -> None:
    """Serve `app` until SIGTERM or SIGINT, then stop it and return, within 5 s of the signal.

    A process that was given its socket also stops when the process that gave it is gone.
    """
    gc.freeze()  # code and what else was loaded stays: no collection need look at it again
    gc.set_threshold(COLLECT_EVERY, 20, 20)
    if fd is not None:
        threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    server(app).run(sockets=[listening_socket(host, port, fd)])


class Server(uvicorn.Server):
    """uvicorn, but a process that stopped as it was told to ends with exit code 0, and one that has
    nothing to do sleeps.

    uvicorn raises the signal once more after stopping, which makes every stop look like a crash.
    It also looks ten times a second whether it should stop.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):  # which also sets the date that responses bear
            with suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Have it stop soon; also from a signal handler."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            deadline = threading.Timer(STOP_S, _give_up)
            deadline.daemon = True
            deadline.start()
        super().handle_exit(sig, frame)
        self.stop()


def _stop_with(parent: int) -> None:
    """Be told to stop as soon as `parent` is gone: killed, it can tell nobody any more."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    logger.warning("the process that started this one is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _give_up() -> None:
    logger.error("stopping took more than %.1f s", STOP_S)
    os._exit(1)
