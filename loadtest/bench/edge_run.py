"""What an edge costs: CPU a token, and time to the first token.

The edge is the real process, with its ledger; the region behind it is one process that answers at
once and steps (`edge_region`), so that what is measured is the edge. CPU: many streams at once,
windows one after the other. Time: one request at a time, in turn by the edge's HTTP and directly by
the link that the edge has, from asking to the first token. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import anyio
import httpx2
import msgspec
import typer
from anyio.abc import Process, SocketStream

from loadtest.bench.edge_region import MODEL
from loadtest.bench.host_clock import Tally, cpu_s, shared_tally
from loadtest.bench.host_load import Load, Outcome, request
from loadtest.bench.host_model import make_model
from origin_gpu.models import read_assets
from routing import wire
from routing.keys import create_key
from routing.link import Link
from routing.serving import listening_socket

ACCOUNT, SECRET, PROMPT = "bench", "of one run on loopback", "Tell me all that you know of sleep"
READY_S, WARM_S, STOP_S = 30.0, 120.0, 30.0
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """What is running."""

    edge: str  # its URL
    region: str
    edge_pid: int
    key: str
    tally: Tally
    folder: Path


@asynccontextmanager
async def bed(step_s: float, environ: Mapping[str, str]) -> AsyncGenerator[Bed, None]:
    """An edge over a region, ready; all of it is gone when the block is left."""
    with tempfile.TemporaryDirectory(prefix="edgefire-edge-") as at:
        folder = Path(at)
        make_model(folder / "model")
        (folder / "secret").touch(mode=0o600)
        (folder / "secret").write_text(SECRET)
        key = create_key(folder / "keys", environ, ACCOUNT)
        words = [SECRET, str(folder / "model"), str(step_s), str(folder / "tally")]
        with shared_tally(folder / "tally") as tally:
            async with _started("loadtest.bench.edge_region", words) as (region, _):
                fleet = {"region": [{"name": "here", "url": region, "latitude": 0, "longitude": 0}]}
                (folder / "fleet.json").write_bytes(msgspec.json.encode(fleet))
                async with _started("edge", _edge_words(folder), by_flag=True) as (edge, process):
                    await _ready(edge)
                    yield Bed(
                        edge=edge,
                        region=region,
                        edge_pid=process.pid,
                        key=key,
                        tally=tally,
                        folder=folder,
                    )


def _edge_words(folder: Path) -> list[str]:
    paths = {
        "--fleet": "fleet.json",
        "--secret-file": "secret",
        "--keys-dir": "keys",
        "--cache-dir": "cache",
        "--ledger": "ledger.sqlite",
    }
    return ["serve", *(word for flag, name in paths.items() for word in (flag, str(folder / name)))]


@asynccontextmanager
async def _started(
    module: str, words: Sequence[str], *, by_flag: bool = False
) -> AsyncGenerator[tuple[str, Process], None]:
    """`python -m module` on a socket of its own, and its URL; ended when the block is left."""
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        fd = str(listener.fileno())
        told = [*words, "--fd", fd] if by_flag else [fd, *words]
        process = await anyio.open_process(
            [sys.executable, "-m", module, *told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield url, process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.aclose()


async def _ready(edge: str) -> None:
    async with httpx2.AsyncClient(trust_env=False) as client:
        with anyio.fail_after(READY_S):
            while True:
                try:
                    if (await client.get(f"{edge}/ready")).status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                await anyio.sleep(_LOOK_S)


async def cpu_us(at: Bed, streams: int, tokens: int, windows: int, window_s: float) -> list[float]:
    """Microseconds of the edge's CPU a token, once a window."""
    load = _load(at, streams, tokens)
    command = [sys.executable, "-m", "loadtest.bench.host_load"]
    clients = await anyio.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
    )
    assert clients.stdin is not None
    await clients.stdin.send(msgspec.json.encode(load) + b"\n")
    with anyio.fail_after(WARM_S):  # past the first answers, which are of any length
        while at.tally.read()[2] < streams * tokens:  # noqa: ASYNC110  another process tells
            await anyio.sleep(_LOOK_S)
    readings = [(at.tally.read()[2], cpu_s(at.edge_pid))]
    for _ in range(windows):
        await anyio.sleep(window_s)
        readings.append((at.tally.read()[2], cpu_s(at.edge_pid)))
    await clients.stdin.aclose()
    assert clients.stdout is not None
    with anyio.fail_after(STOP_S):
        told = b"".join([part async for part in clients.stdout])
        await clients.aclose()
    outcome = msgspec.json.decode(told, type=Outcome)
    if outcome.bad or not outcome.answers:
        raise typer.BadParameter(f"a client got {outcome.bad}")
    return [
        1e6 * (later[1] - before[1]) / (later[0] - before[0])
        for before, later in pairwise(readings)
    ]


async def first_ms(at: Bed, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token by the edge, and by the link, in turn.

    The edge is asked over a bare socket: an HTTP client in Python takes a millisecond by itself.
    """
    by_edge: list[float] = []
    by_link: list[float] = []
    link: Link[wire.Event] = Link(at.region, SECRET, wire.Event)
    asked = request(_load(at, 1, 2), 2)
    async with (
        await anyio.connect_tcp("127.0.0.1", int(at.edge.rpartition(":")[2])) as edge,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(link.run)
        await link.wait_connected()
        for _ in range(rounds):
            by_edge.append(await _by_edge(edge, asked))
            by_link.append(await _by_link(link, _generate(at)))
        tasks.cancel_scope.cancel()
    return by_edge, by_link


def _load(at: Bed, streams: int, tokens: int) -> Load:
    host, port = at.edge.removeprefix("http://").split(":")
    return Load(
        host=host,
        port=int(port),
        path=f"/client/v4/accounts/{ACCOUNT}/ai/run/{MODEL}",
        key=at.key,
        body={"stream": True, "prompt": PROMPT},
        num_streams=streams,
        output_tokens=tokens,
    )


def _generate(at: Bed) -> wire.Generate:
    return wire.Generate(
        request_id="direct",
        tenant_salt=b"",
        model=MODEL,
        tokenizer_digest=read_assets(at.folder / "model").digest,
        token_ids=tuple(PROMPT.encode()),
        sampling=wire.Sampling(max_tokens=2, seed=1),
        budget_s=60.0,
    )


async def _by_edge(edge: SocketStream, asked: bytes) -> float:
    began = time.perf_counter()
    await edge.send(asked)
    heard, first = b"", 0.0
    while not heard.endswith(b"\r\n0\r\n\r\n"):
        heard += await edge.receive()
        if not first and b"data: " in heard:
            first = time.perf_counter()
    return 1000 * (first - began)


async def _by_link(link: Link[wire.Event], request: wire.Generate) -> float:
    came, first = anyio.Event(), list[float]()

    def hear(event: wire.Event | None) -> None:
        if isinstance(event, wire.Tokens) and not first:
            first.append(time.perf_counter())
        if isinstance(event, wire.Finish) or event is None:
            came.set()

    began = time.perf_counter()
    link.open_nowait(request, hear)
    await came.wait()
    return 1000 * (first[0] - began)


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


async def measure(
    environ: Mapping[str, str],
    streams: int,
    step_ms: float,
    windows: int,
    window_s: float,
    rounds: int,
) -> None:
    async with bed(step_ms / 1000, environ) as at:
        by_edge, by_link = await first_ms(at, rounds)
        cpu = await cpu_us(at, streams, 256, windows, window_s)
    added = median(by_edge) - median(by_link)
    print("| measured | n | median (least-most) |\n|---|---:|---:|")
    print(f"| first token by the edge, ms | {len(by_edge)} | {spread(by_edge)} |")
    print(f"| first token by the link, ms | {len(by_link)} | {spread(by_link)} |")
    print(f"| the edge adds at the median, ms | | {added:.2f} |")
    print(f"| CPU a token at {streams} streams, us | {len(cpu)} | {spread(cpu)} |")
    print(f"| CPU seconds a million tokens | | {median(cpu):.1f} |")
