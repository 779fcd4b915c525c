"""The engine process: notes in and results out over a socket pair, around the engine's steps.

Knows the framing of `infire.notes`, and nothing of models.
"""

from __future__ import annotations

import gc
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Protocol

import msgspec

from infire.notes import (
    PREFIX_BYTES,
    Broken,
    FromEngine,
    Gauges,
    Hello,
    Note,
    Notes,
    Results,
    take_frames,
)

HEARTBEAT_S = 1.0  # between frames when idle
RESTING_S = 0.01  # between blocks that are written while there is nothing else to do
MAX_UNREAD_BYTES = 4 << 20  # past this, a peer that does not read stops the steps
FAREWELL_S = 5.0  # for telling the peer why the process ends
_RECEIVE_BYTES = 1 << 18


class Engine(Protocol):
    """What is served: `infire.engine.Engine`, or `infire.embed.EmbedEngine`."""

    def do(self, note: Note) -> None:
        """Take a note, between steps."""

    def step(self) -> Results | None:
        """Compute a little. None when there was nothing to compute and nothing to answer."""

    def rest(self) -> bool:
        """Use a time without work; whether more can be done in it."""

    def gauges(self) -> Gauges: ...
    def close(self) -> None: ...


class Hangup(Exception):
    """The peer has closed its end."""


class Peer:
    """The worker's end of the socket pair. Nothing here waits but `wait` and `flush`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._decode = msgspec.msgpack.Decoder(Notes).decode
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._received = bytearray()
        self._unsent = bytearray()

    @property
    def num_unsent(self) -> int:
        """Bytes that the peer has not taken yet."""
        return len(self._unsent)

    def send_nowait(self, message: FromEngine) -> None:
        """Queue one frame, and send what the socket takes at once."""
        begin = len(self._unsent)
        self._unsent += bytes(PREFIX_BYTES)
        self._encode_into(message, self._unsent, begin + PREFIX_BYTES)
        num_bytes = len(self._unsent) - begin - PREFIX_BYTES
        self._unsent[begin : begin + PREFIX_BYTES] = num_bytes.to_bytes(PREFIX_BYTES, "little")
        self._send_queued()

    def receive_nowait(self) -> Iterator[Note]:
        """The notes of every whole frame that has arrived. Raises `Hangup`."""
        self._fill()
        for frame in take_frames(self._received):
            yield from self._decode(frame).notes

    def wait(self, timeout_s: float) -> None:
        """Until something arrives, queued bytes can go out, or the time is over."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._sock, events)
        for _, ready in self._selector.select(max(timeout_s, 0.0)):
            if ready & selectors.EVENT_WRITE:
                self._send_queued()

    def flush(self, timeout_s: float) -> None:
        """Send what is queued, for at most so long; a peer that is gone is no error."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(self._unsent)
        except OSError:  # TimeoutError among them
            return
        finally:
            self._unsent.clear()

    def close(self) -> None:
        self._selector.close()
        self._sock.close()

    def _fill(self) -> None:
        try:
            while chunk := self._sock.recv(_RECEIVE_BYTES):
                self._received += chunk
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise Hangup from error
        raise Hangup

    def _send_queued(self) -> None:
        try:
            while self._unsent:
                num_bytes = self._sock.send(self._unsent)
                del self._unsent[:num_bytes]
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise Hangup from error


def serve(sock: socket.socket, hello: Hello, engine: Engine) -> None:
    """Say hello, then step and answer until the peer hangs up. Closes `sock`.

    An error inside a step leaves the cache in an unknown state: the peer is told, and it is raised.
    """
    peer = Peer(sock)
    try:
        peer.send_nowait(hello)
        _step_until_hangup(peer, engine)
    except Hangup:
        return
    except Exception as error:
        _say_broken(peer, error)
        raise
    finally:
        peer.close()
        engine.close()


def serve_process(fd: int, load: Callable[[], tuple[Hello, Engine]]) -> None:
    """A whole engine process on the inherited socket `fd`: load, then `serve`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the worker decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sock = socket.socket(fileno=fd)
    try:
        hello, engine = load()
    except Exception as error:
        peer = Peer(sock)
        _say_broken(peer, error)
        peer.close()
        raise
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection need look at it again
    serve(sock, hello, engine)


def _step_until_hangup(peer: Peer, engine: Engine) -> None:
    said = monotonic()
    while True:
        acted = False
        for note in peer.receive_nowait():
            engine.do(note)
            acted = True
        results = engine.step() if peer.num_unsent < MAX_UNREAD_BYTES else None
        idle_s = monotonic() - said
        # Acts change the gauges, and a peer that does not read needs no heartbeat.
        if results is None and not peer.num_unsent and (acted or idle_s >= HEARTBEAT_S):
            results = Results(engine.gauges())
        if results is None:
            wait_s = HEARTBEAT_S if peer.num_unsent else HEARTBEAT_S - idle_s
            peer.wait(min(RESTING_S, wait_s) if engine.rest() else wait_s)
        else:
            peer.send_nowait(results)
            said = monotonic()


def _say_broken(peer: Peer, error: Exception) -> None:
    try:
        peer.send_nowait(Broken(f"{type(error).__name__}: {error}"))
    except Hangup:
        return
    peer.flush(FAREWELL_S)
