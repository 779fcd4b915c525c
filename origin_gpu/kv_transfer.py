"""Move the KV of one sequence from one worker to another: a file here becomes a file there.

TCP, one connection a transfer:

    collector                               door
    Collect(secret, request, epoch, layout) ->
                                         <- Offer(num_bytes) | Refusal(code, detail)
                                         <- num_bytes of KV
    one byte, once all of it is there    ->

Frames are 4 bytes of little-endian length and MessagePack. Only after the last byte has been
acknowledged does the giver let go of its blocks; a transfer that breaks off can be tried again.
Non-blocking sockets and sendfile, so that tokens of other requests are not held up.
"""

from __future__ import annotations

import hmac
import logging
import mmap
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio
import anyio.lowlevel
import msgspec
from msgspec import Struct

from routing.errors import Code, Failure
from routing.logs import log

logger = logging.getLogger(__name__)

STALL_S = 10.0  # without a byte moving, after which the other end is taken for dead
CHUNK_BYTES = 1 << 20  # moved before others get their turn
BUFFER_BYTES = 4 << 20
MOST_FRAME_BYTES = 1 << 16
ROOMY_BYTES = 1 << 30  # free space below which shared memory is left alone
_FOLDER = "edgefire-kv-"
_DONE = b"\1"


class Collect(Struct, frozen=True, kw_only=True):
    secret: str
    request_id: str
    epoch: str
    layout_digest: str


class Offer(Struct, frozen=True, tag="offer"):
    num_bytes: int


class Refusal(Struct, frozen=True, tag="refusal"):
    code: Code
    detail: str


@dataclass(frozen=True, slots=True)
class Exported:
    path: Path
    num_bytes: int


class Holder(Protocol):
    """Whoever keeps finished sequences for others: the prefill role."""

    def export(self, wanted: Collect) -> AbstractAsyncContextManager[Exported]:
        """The KV as a file, for the length of the block. Raises Failure."""

    def collected(self, request_id: str) -> None:
        """All of it has arrived."""


class _Broke(Exception):
    """The other end is gone, or stuck."""


class _Wire:
    """A connected, non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    async def read_into(self, view: memoryview) -> None:
        """Fill `view`."""
        done = 0
        while done < len(view):
            try:
                count = self._sock.recv_into(view[done : done + CHUNK_BYTES])
            except BlockingIOError:
                await self._wait_readable()
                continue
            except OSError as error:
                raise _Broke(str(error)) from error
            if not count:
                raise _Broke(f"closed after {done} of {len(view)} bytes")
            done += count
            await anyio.lowlevel.checkpoint()

    async def read_frame(self) -> bytes:
        prefix = bytearray(4)
        await self.read_into(memoryview(prefix))
        size = int.from_bytes(prefix, "little")
        if size > MOST_FRAME_BYTES:
            raise _Broke(f"a frame of {size} bytes")
        body = bytearray(size)
        await self.read_into(memoryview(body))
        return bytes(body)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await self._wait_writable()
            except OSError as error:
                raise _Broke(str(error)) from error

    async def write_frame(self, message: Struct) -> None:
        body = msgspec.msgpack.encode(message)
        await self.write(len(body).to_bytes(4, "little") + body)

    async def write_file(self, path: Path, num_bytes: int) -> None:
        """From the page cache to the socket, without a copy in this process."""
        with path.open("rb") as file:
            done = 0
            while done < num_bytes:
                try:
                    count = os.sendfile(
                        self._sock.fileno(), file.fileno(), done, min(CHUNK_BYTES, num_bytes - done)
                    )
                except BlockingIOError:
                    await self._wait_writable()
                    continue
                except OSError as error:
                    raise _Broke(str(error)) from error
                if not count:
                    raise _Broke(f"the file ends after {done} of {num_bytes} bytes")
                done += count
                await anyio.lowlevel.checkpoint()

    async def _wait_readable(self) -> None:
        with _patience():
            await anyio.wait_readable(self._sock)

    async def _wait_writable(self) -> None:
        with _patience():
            await anyio.wait_writable(self._sock)


@contextmanager
def _patience() -> Generator[None, None, None]:
    try:
        with anyio.fail_after(STALL_S):
            yield
    except TimeoutError:
        raise _Broke(f"nothing moved for {STALL_S:g} s") from None


class KVDoor:
    """Where other workers collect KV from this one."""

    def __init__(self, host: str, secret: str, holder: Holder) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.setblocking(False)
        self._secret = secret
        self._holder = holder
        found, port = self._listener.getsockname()[:2]
        self.address = f"[{found}]:{port}" if ":" in found else f"{found}:{port}"

    async def run(self) -> None:
        """Answer until cancelled."""
        with self._listener:
            async with anyio.create_task_group() as tasks:
                while True:
                    await anyio.wait_readable(self._listener)
                    try:
                        sock, _ = self._listener.accept()
                    except OSError:  # gone again before it was accepted
                        continue
                    tasks.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            connection = _Wire(sock)
            try:
                wanted = msgspec.msgpack.decode(await connection.read_frame(), type=Collect)
                await self._answer(connection, wanted)
            except (_Broke, msgspec.DecodeError) as error:
                log(logger, "kv transfer broke off", reason=str(error))

    async def _answer(self, connection: _Wire, wanted: Collect) -> None:
        try:
            if not hmac.compare_digest(wanted.secret.encode(), self._secret.encode()):
                raise Failure(Code.UNAUTHENTICATED, "the fleet's secret is needed here")
            async with self._holder.export(wanted) as exported:
                await connection.write_frame(Offer(exported.num_bytes))
                await connection.write_file(exported.path, exported.num_bytes)
                await connection.read_into(memoryview(bytearray(len(_DONE))))
        except Failure as failure:
            await connection.write_frame(Refusal(failure.code, failure.detail))
        else:
            self._holder.collected(wanted.request_id)


async def collect(address: str, wanted: Collect, num_bytes: int, into: Path) -> None:
    """Fetch KV of `num_bytes` from the door at `address` into the new file `into`.

    Raises Failure: the door's own words, or LOST. What a failure leaves of the file is the
    caller's to remove.
    """
    host, _, port = address.rpartition(":")
    try:
        with await _connect(host.strip("[]"), int(port)) as sock:
            connection = _Wire(sock)
            await connection.write_frame(wanted)
            answer = msgspec.msgpack.decode(await connection.read_frame(), type=Offer | Refusal)
            if isinstance(answer, Refusal):
                raise Failure(answer.code, answer.detail)
            if answer.num_bytes != num_bytes:
                raise Failure(
                    Code.INCOMPATIBLE,
                    f"KV of {answer.num_bytes} bytes, the ticket says {num_bytes}",
                )
            await _receive(connection, num_bytes, into)
            await connection.write(_DONE)
    except (_Broke, msgspec.DecodeError, OSError) as error:
        raise Failure(Code.LOST, f"KV from {address}: {error}") from error


async def _receive(connection: _Wire, num_bytes: int, into: Path) -> None:
    with into.open("x+b") as file:
        file.truncate(num_bytes)
        with mmap.mmap(file.fileno(), num_bytes) as mapped, memoryview(mapped) as view:
            await connection.read_into(view)


async def _connect(host: str, port: int) -> socket.socket:
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        sock.setblocking(False)
        if sock.connect_ex(where):  # under way
            with _patience():
                await anyio.wait_writable(sock)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def kv_folder() -> Generator[Path, None, None]:
    """A private folder for KV on its way, in shared memory if there is room; gone at the end.

    Folders left behind by processes that were killed are removed first.
    """
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > ROOMY_BYTES
    parent = shared if roomy else Path(tempfile.gettempdir())
    for left in parent.glob(f"{_FOLDER}*"):
        if not _alive(left.name.removeprefix(_FOLDER).split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{_FOLDER}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):  # somebody else's, or not one of ours at all
        return True
    return True
