"""How every server process of the fleet listens, serves and stops. Of the app it knows its `Drain`.

The first SIGTERM or SIGINT begins the drain, during which it listens and serves as before: the app
refuses by name what is new. The second ends it, as does its grace. Then connections are closed.
"""

from __future__ import annotations

import asyncio  # noqa: TID251  uvicorn's own
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from routing.abort import AbortableProtocol, PromptProtocol
from routing.drain import Drain

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20  # of one WebSocket message: a prompt of 128k ids takes 0.6 MB
DEAD_PEER_S = 90  # a peer that takes nothing of what was sent for so long is disconnected
KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections: else both ends race
DATE_S = 1.0  # as exact as an HTTP date is
CLOSE_S = 2  # connections may close by themselves for this long once a drain is over
LOOK_S = 0.05  # between looks whether one is
PARENT_CHECK_S = 0.5
# New objects before the collector looks at them, and times 20 at older ones. A server makes a few
# for every token and drops them at once: with Python's 700 it would look for cycles every step.
COLLECT_EVERY = 50_000
STOP_S = 4.5  # after a drain is over, a process is gone in this, whatever it still does


def listening_socket(host: str, port: int, fd: int | None = None) -> socket.socket:
    """The listening socket inherited as `fd`; without one, a new one on host and port (0: any).

    Where there is no such host, or the port is taken, the process ends and says so.
    """
    if fd is not None:
        listener = socket.socket(fileno=fd)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as exc:
            sys.exit(f"--host {host} --port {port}: {exc.strerror}")
    # Its connections inherit what is set here. asyncio sets this one where it knows a socket's
    # protocol, which it does not of a new one's: head and body of an answer would be 40 ms apart.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_S)
    return listener


def address(listener: socket.socket) -> str:
    """Where others reach the process that listens here, as http://host:port."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: ASGIApp, drain: Drain | None = None) -> Server:
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
            timeout_graceful_shutdown=CLOSE_S,
        ),
        drain or Drain(grace_s=0.0),
    )


def serve_app(
    app: ASGIApp, *, host: str, port: int, fd: int | None = None, drain: Drain | None = None
) -> None:
    """Serve `app` until SIGTERM or SIGINT, then let it drain, stop it and return.

    All within 5 s of the drain's grace, or of a second signal. A process that was given its socket
    is also told to stop when the process that gave it is gone.
    """
    gc.freeze()  # code and what else was loaded stays: no collection need look at it again
    gc.set_threshold(COLLECT_EVERY, 20, 20)
    if fd is not None:
        threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    server(app, drain).run(sockets=[listening_socket(host, port, fd)])


class Server(uvicorn.Server):
    """uvicorn, but a process that stopped as it was told to ends with exit code 0, and one that has
    nothing to do sleeps.

    uvicorn raises the signal once more after stopping, which makes every stop look like a crash.
    It also looks ten times a second whether it should stop.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        self._num_told = 0  # signals
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadline: threading.Timer | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not self._num_told:
            if await self.on_tick(0):  # which also sets the date that responses bear
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._woken.wait()
        self._drain.begin(self._loop.time())
        while self._num_told == 1 and not self._is_drained(self._loop.time()):
            await asyncio.sleep(LOOK_S)
            await self.on_tick(0)
        self._must_end_within(STOP_S)
        self._drain.cut()
        for listening in self.servers:
            listening.close()
        await asyncio.sleep(LOOK_S)  # the last to be connected are told no, not hung up on

    def stop(self) -> None:
        """Have it stop soon, without a drain."""
        self.should_exit = True
        self._wake()

    def _wake(self) -> None:
        """Also from a signal handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    def _is_drained(self, now: float) -> bool:
        transports = [it.transport for it in self.server_state.connections]
        unsent = any(it.get_write_buffer_size() for it in transports)
        return self._drain.is_over(now, unsent=unsent)

    def _must_end_within(self, limit_s: float) -> None:
        """Whatever hangs from now on, also if that is the event loop."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = threading.Timer(limit_s, _give_up)
        self._deadline.daemon = True
        self._deadline.start()

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
        self._num_told += 1
        if self._num_told <= 2:
            grace_s = self._drain.grace_s if self._num_told == 1 else 0.0
            self._must_end_within(grace_s + STOP_S)
        self._wake()


def _stop_with(parent: int) -> None:
    """Be told to stop as soon as `parent` is gone: killed, it can tell nobody any more."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    logger.warning("the process that started this one is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _give_up() -> None:
    logger.error("stopping took more than %.1f s", STOP_S)
    os._exit(1)
