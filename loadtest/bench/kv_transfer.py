"""`python -m loadtest.bench.kv_transfer`: KV from one process to another, by every way.

In every round, in turn: a copy in memory; a bare socket, `recv_into` one buffer; and each way of
`origin_gpu`, from a door in a process of its own to a file here, which is then read into one
buffer, as the engine does that takes it. The environment's UCX_TLS says what NIXL may use.
"""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import anyio
import numpy as np
import typer
from numpy.typing import NDArray

from infire.kv_layout import KVGroup, KVLayout
from loadtest.bench.processor import machine
from loadtest.bench.table import markdown, number
from origin_gpu.handover import KVTicket, Peer
from origin_gpu.kv_files import KVFiles, open_files, roots
from origin_gpu.kv_nixl import Nixl, NotInstalled
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_transfer import DoorTransport, KVDoor
from origin_gpu.kv_ways import Way

SECRET = "bench"
COPY, SOCKET = "copy in memory", "bare socket"
LAYOUT = KVLayout(
    groups=(KVGroup(kind="full", layers=(0,), num_heads=1, head_dim=64, block_tokens=16),),
    dtype="bfloat16",
    model_digest="0",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    mib: Annotated[int, typer.Option(min=1, help="Of KV in each transfer.")] = 64,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
) -> None:
    num_bytes = mib << 20
    times = anyio.run(measure, num_bytes, rounds)
    typer.echo(table(times, num_bytes))
    typer.echo(f"{machine()}; {mib} MiB, {rounds} rounds in turn; medians, least and most.")


async def measure(num_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    times: dict[str, list[float]] = {}
    with giver(num_bytes) as (door, bare), open_files(roots()) as files:
        collectors = {
            name: Collector(ways, door, num_bytes, files) for name, ways in ends().items()
        }
        copy, receive = copier(num_bytes), receiver(bare, num_bytes)
        for _ in range(rounds):
            times.setdefault(COPY, []).append(copy())
            times.setdefault(SOCKET, []).append(receive())
            for name, collector in collectors.items():
                took, read = await collector.collect()
                times.setdefault(name, []).append(took)
                times.setdefault(f"{name}, and read", []).append(took + read)
    return times


def ends() -> dict[str, list[Way]]:
    """The collector's end of every way there is here."""
    found: dict[str, list[Way]] = {"shared": [SharedFiles()], "tcp": []}
    with suppress(NotInstalled):
        found["nixl"] = [Nixl()]
    return found


def copier(num_bytes: int) -> Callable[[], float]:
    """Seconds of a copy into memory that is there already."""
    source, target = content(num_bytes), np.zeros(num_bytes, np.uint8)

    def copy() -> float:
        began = perf_counter()
        np.copyto(target, source)
        return perf_counter() - began

    return copy


def receiver(address: tuple[str, int], num_bytes: int) -> Callable[[], float]:
    """Seconds from asking a bare socket for all of it to having it, in one buffer."""
    room = memoryview(bytearray(num_bytes))

    def receive() -> float:
        with socket.create_connection(address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = perf_counter()
            sock.sendall(b"!")
            received = 0
            while received < num_bytes:
                received += sock.recv_into(room[received:])
            return perf_counter() - began

    return receive


class Collector:
    """This end of one way."""

    def __init__(self, ways: Sequence[Way], door: str, num_bytes: int, files: KVFiles) -> None:
        self._kind = ways[0].kind if ways else "tcp"
        self._transport = DoorTransport(SECRET, ways=ways)
        self._files = files
        self._ticket = ticket(num_bytes)
        self._peer = Peer(name="giver", role="prefill", url="http://127.0.0.1:1", kv_address=door)
        self._expected = content(num_bytes)
        self._room = np.zeros(num_bytes, np.uint8)

    async def collect(self) -> tuple[float, float]:
        """Seconds of a collection, dialling included, and of reading what came."""
        with self._files.new(self._ticket.num_bytes) as path:
            began = perf_counter()
            went = await self._transport.collect(self._ticket, self._peer, path)
            there = perf_counter()
            _read(path, self._room)
            read = perf_counter()
        assert went == self._kind
        assert np.array_equal(self._room, self._expected)
        return there - began, read - there


def _read(path: Path, room: NDArray[np.uint8]) -> None:
    with path.open("rb") as file:
        file.readinto(room.data)


@contextmanager
def giver(num_bytes: int) -> Generator[tuple[str, tuple[str, int]], None, None]:
    """A process with a door and a bare socket: the addresses of both."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_give, args=(theirs, num_bytes))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def _give(pipe: Pipe, num_bytes: int) -> None:
    async def offer() -> None:
        ways = [way for some in ends().values() for way in some]
        with (
            open_files(roots()) as files,
            files.new(num_bytes) as path,
            KVDoor("127.0.0.1", SECRET, ways=ways) as door,
            socket.create_server(("127.0.0.1", 0)) as bare,
            door.offer(ticket(num_bytes), path) as offered,
        ):
            content(num_bytes).tofile(path)
            offered.exported()
            threading.Thread(target=_send, args=(bare, num_bytes), daemon=True).start()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(door.run)
                pipe.send((door.address, bare.getsockname()))
                await anyio.to_thread.run_sync(pipe.recv)
                tasks.cancel_scope.cancel()

    anyio.run(offer)


def _send(listener: socket.socket, num_bytes: int) -> None:
    data = content(num_bytes).data
    while True:
        with listener.accept()[0] as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.recv(1)
            sock.sendall(data)


def content(num_bytes: int) -> NDArray[np.uint8]:
    """The same everywhere."""
    return np.random.default_rng(1).integers(0, 256, num_bytes, np.uint8)


def ticket(num_bytes: int) -> KVTicket:
    return KVTicket(
        worker="giver", url="http://127.0.0.1:1", request_id="r", epoch="life", num_tokens=1,
        num_bytes=num_bytes, layout=LAYOUT, lease_s=60.0,
    )  # fmt: skip


def table(times: dict[str, list[float]], num_bytes: int) -> str:
    """A line for each."""
    lines = []
    for name, took in times.items():
        rates = sorted(num_bytes / seconds / 1e9 for seconds in took)
        shares = [
            f"{median(a / b for a, b in zip(times[other], took, strict=True)):.2f}x"
            for other in (COPY, SOCKET)
        ]
        spread = f"{number(rates[0])} to {number(rates[-1])}"
        lines.append([name, number(median(rates)), spread, *shares])
    return markdown(["", "GB/s", "in all rounds", "of a copy", "of a bare socket"], lines)


if __name__ == "__main__":
    app()
