"""The engine's process, a child of its worker, and the socket over which frames pass between them.

Knows the framing of `infire.notes`, and nothing of what the frames mean.
"""

from __future__ import annotations

import asyncio  # noqa: TID251  a callback, where a task would wake up for each step
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
from anyio.abc import Process

from infire.notes import PREFIX_BYTES, FromEngine, Note, Notes, take_frames
from routing.arrival import hand_out

STOP_S = 1.0  # what an engine has for its last step, from the closing of its socket to SIGKILL
_RECEIVE_BYTES = 1 << 18


class EngineLost(Exception):
    """The engine's process is gone, or of no more use. Says why."""


class EngineSocket:
    """The worker's end of the socket pair: one reader, one writer."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._received = bytearray()

    async def send(self, notes: Sequence[Note]) -> None:
        """One frame. It waits where the engine, busy with a step, has not read the last ones."""
        frame = self._encode(Notes(tuple(notes)))
        unsent = memoryview(len(frame).to_bytes(PREFIX_BYTES, "little") + frame)
        while unsent:
            try:
                unsent = unsent[self._sock.send(unsent) :]
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
            except ConnectionError as exc:
                raise EngineLost(f"it takes no more notes ({exc})") from exc

    async def read(self, hear: Callable[[Iterator[FromEngine]], None]) -> None:
        """Have `hear` called with the frames that are whole each time something arrives, if any.

        It is called with no task in between, so it must not wait. What it raises ends this, as does
        EngineLost, at the latest.
        """
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def arrived() -> None:
            try:
                hand_out(hear, self._take())
            except Exception as exc:  # noqa: BLE001  raised by the `await` below
                loop.remove_reader(self._sock)
                if not ended.done():
                    ended.set_exception(exc)

        loop.add_reader(self._sock, arrived)
        try:
            await ended
        finally:
            loop.remove_reader(self._sock)

    async def receive(self) -> Iterator[FromEngine]:
        """The frames that are whole with what arrives next, if any. EngineLost at the end."""
        await anyio.wait_readable(self._sock)
        return self._take()

    def _take(self) -> Iterator[FromEngine]:
        try:
            chunk = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return iter(())
        except ConnectionError as exc:
            raise EngineLost(f"its socket broke ({exc})") from exc
        if not chunk:
            raise EngineLost("it closed its socket")
        self._received += chunk
        return self._whole_frames()

    def _whole_frames(self) -> Iterator[FromEngine]:
        for frame in take_frames(self._received):
            try:
                yield self._decode(frame)
            except msgspec.DecodeError as exc:
                raise EngineLost(f"malformed frame of {len(frame)} bytes: {exc}") from exc


@asynccontextmanager
async def engine_process(command: Sequence[str]) -> AsyncGenerator[EngineSocket, None]:
    """A new process of `command`, with `--fd N` added; it has ended when the block is left.

    Should this process die, the other end of the socket closes, by which the engine ends as well.
    An `EngineLost` that leaves the block also says how the process ended.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:  # only the child may keep it, else its death would close nothing
            process = await _spawn(command, theirs.fileno())
        lost: EngineLost | None = None
        try:
            yield EngineSocket(ours)
        except EngineLost as exc:
            lost = exc
        finally:
            ours.close()
            await _end(process)
        if lost is not None:
            raise EngineLost(f"{lost}; {_how(process.returncode)}") from lost


async def _spawn(command: Sequence[str], fd: int) -> Process:
    """In the worker's process group, and with its standard error: its log is the worker's."""
    try:
        with anyio.CancelScope(shield=True):  # else it could start and nobody know it
            process = await anyio.open_process(
                [*command, "--fd", str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=None,
                stderr=None,
                pass_fds=(fd,),
            )
    except OSError as exc:
        raise EngineLost(f"{command[0]} cannot be started: {exc}") from exc
    return process


async def _end(process: Process) -> None:
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(STOP_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _how(code: int | None) -> str:
    assert code is not None
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
