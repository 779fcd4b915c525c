"""What tests of failures share: streams heard to their end, processes restarted, edges behind a
network that fails, and metrics read by name.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from origin_gpu.handover import Peer, Watch, Watched, WorkerEvent
from routing import wire
from routing.link import Link
from tests.fakes.events import frames
from tests.system.procs import wait_ready
from tests.system.world import MODEL, PLACES, ROOT, Process, Shape, World, edge_words, start, world
from tests.system.world import worker_words as words_of

PATIENCE_S = 30.0  # for what is sure to come, on a busy machine
BROKEN = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)
FAULTY_ENGINE = ROOT / "tests/fakes/faulty_engine.py"


@dataclass
class Heard:
    """What a client got of a stream so far."""

    text: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0
    status: int = 0

    async def until(self, num_chars: int) -> None:
        """Until so much text has come."""
        with anyio.fail_after(PATIENCE_S):
            while len(self.text) < num_chars:
                await anyio.sleep(0.002)


async def hear(w: World, heard: Heard, prompt: str, max_tokens: int, **fields: Any) -> None:
    """Ask for a stream, and read it to its end."""
    async with w.stream(prompt, max_tokens, **fields) as response:
        heard.status = response.status_code
        assert response.status_code == 200, await response.aread()
        async for frame in frames(response):
            if isinstance(frame, str):
                heard.num_done += 1
            elif frame.get("errors"):
                heard.errors.append(frame)
            else:
                heard.text += frame["response"]
                heard.usage = frame.get("usage", heard.usage)


async def restart(w: World, name: str, words: Sequence[str]) -> Process:
    """Another process with `words` where `name` listens, which is killed first."""
    former = w.processes[name]
    former.kill()
    port = urlsplit(former.url).port
    assert port is not None
    with anyio.fail_after(PATIENCE_S):  # the kernel may hold it a little longer than its process
        while not is_free(port):
            await anyio.sleep(0.01)
    return start(w, name, words, port)


async def second_edge(w: World) -> Process:
    """Another over the same files."""
    edge = start(w, "edge-2", edge_words(w, w.home / "fleet.toml"))
    await wait_ready(w, edge)
    return edge


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def wait_served(w: World, region: str = "weur") -> None:
    """Until the region's front and the edge would both send a request on."""
    await wait_ready(w, w.processes[f"{region}-front"])
    with anyio.fail_after(PATIENCE_S):
        while (await w.raw("A", 1)).status_code != 200:
            await anyio.sleep(0.05)


def worker_words(
    w: World, role: str, *flags: str, shape: Shape | None = None, folder: Path | None = None
) -> list[str]:
    """As `world` starts a worker of the region weur, with more flags."""
    folder = folder or w.home / "model"
    return [*words_of(w, shape or Shape(), "weur", role, folder), *flags]


def faulty_words(w: World, role: str, *engine_flags: str) -> list[str]:
    """A worker of the region weur with an engine of `tests/fakes/faulty_engine.py`."""
    words = worker_words(w, role)
    at = words.index("--engine-command") + 1
    words[at] = words[at].split()[0] + f" {FAULTY_ENGINE} " + " ".join(engine_flags)
    return words


async def metric(w: World, process: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    text = (await w.client.get(f"{w.processes[process].url}/metrics")).text
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.partition("{")[0].partition(" ")[0] == name and all(it in line for it in wanted)
    )


async def wait_metric(w: World, process: str, name: str, value: float, **labels: str) -> None:
    with anyio.fail_after(PATIENCE_S):
        while await metric(w, process, name, **labels) != value:
            await anyio.sleep(0.01)


async def nothing_in_flight(w: World, region: str = "weur") -> None:
    """Until edge and front have forgotten every request; `World.settled` is for the workers."""
    await wait_metric(w, "edge", "edgefire_edge_in_flight", 0)
    await wait_metric(w, f"{region}-front", "edgefire_front_in_flight", 0)


class Network:
    """A TCP proxy whose connections can be cut or held at any time, also all later ones."""

    def __init__(self, target: str) -> None:
        self.url = ""
        self.back = self.forth = 1 << 60  # bytes that may still pass to callers, and from them
        self.act: Literal["cut", "hold"] = "cut"  # what happens then
        self.stopped = anyio.Event()  # it has happened
        self.down = False  # no new connection lives
        self.num_cuts = 0
        self._on = anyio.Event()
        self._target = urlsplit(target)
        self._scopes: set[anyio.CancelScope] = set()

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def cut(self) -> None:
        """End every connection there is."""
        self.num_cuts += 1
        for scope in self._scopes:
            scope.cancel()

    def let_on(self) -> None:
        """What is held goes on."""
        self._on.set()
        self._on = anyio.Event()

    async def handle(self, caller: SocketStream) -> None:
        async with caller:
            if self.down:
                return
            host, port = self._target.hostname, self._target.port
            assert host is not None
            assert port is not None
            try:
                target = await anyio.connect_tcp(host, port)
            except OSError:
                return
            async with target, anyio.create_task_group() as tasks:
                self._scopes.add(tasks.cancel_scope)
                tasks.start_soon(self._forth, caller, target, tasks.cancel_scope)
                await self._pass_back(target, caller)
                tasks.cancel_scope.cancel()
                self._scopes.discard(tasks.cancel_scope)

    async def _forth(
        self, caller: ByteStream, target: ByteStream, scope: anyio.CancelScope
    ) -> None:
        try:
            while True:
                content = await caller.receive()
                passed, rest = content[: self.forth], content[self.forth :]
                self.forth -= len(passed)  # before other connections pass something
                is_last = not self.forth
                await target.send(passed)
                if is_last:
                    await self._stop()
                    await target.send(rest)
        except BROKEN:
            scope.cancel()

    async def _pass_back(self, target: ByteStream, caller: ByteStream) -> None:
        with suppress(*BROKEN):
            while True:
                content = await target.receive()
                passed, rest = content[: self.back], content[self.back :]
                self.back -= len(passed)
                is_last = not self.back
                await caller.send(passed)
                if is_last:
                    await self._stop()
                    await caller.send(rest)

    async def _stop(self) -> None:
        """This much and no more, once: later connections pass."""
        self.back = self.forth = 1 << 60
        self.stopped.set()
        if self.act == "cut":
            self.cut()
            await anyio.sleep_forever()
        await self._on.wait()


@asynccontextmanager
async def network(target: str) -> AsyncGenerator[Network, None]:
    made = Network(target)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    made.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, made.handle)
        yield made
        tasks.cancel_scope.cancel()


async def another_edge(w: World, urls: Mapping[str, str], *flags: str) -> None:
    """Put an edge that reaches the regions at `urls` in the place of the world's own."""
    w.processes["first-edge"] = w.processes.pop("edge")
    rows = [
        f'[[region]]\nname = "{name}"\nurl = "{url}"\n'
        f"latitude = {PLACES[name][0]}\nlongitude = {PLACES[name][1]}\n"
        for name, url in urls.items()
    ]
    fleet = w.home / "another-fleet.toml"
    fleet.write_text("\n".join(rows))
    await wait_ready(w, start(w, "edge", [*edge_words(w, fleet), *flags]))


@asynccontextmanager
async def world_over(home: Path, shape: Shape) -> AsyncGenerator[tuple[World, Network], None]:
    """A world whose edge reaches its first region over a network that can fail."""
    async with world(home, shape) as w:
        urls = {name: w.processes[f"{name}-front"].url for name in shape.regions}
        first = shape.regions[0]
        async with network(urls[first]) as net:
            await another_edge(w, urls | {first: net.url})
            yield w, net


async def request_to(
    made: World, name: str, *, last: int = 65, num_prompt: int, max_tokens: int, **fields: Any
) -> wire.Generate:
    """A prompt of ids `last`, which goes on last + 1, last + 2, ... in the words of a front."""
    return wire.Generate(
        **{
            "request_id": "r1",
            "tenant_salt": b"",
            "model": MODEL,
            "tokenizer_digest": (await made.worker(name)).models[0].tokenizer_digest,
            "token_ids": (last,) * num_prompt,
            "sampling": wire.Sampling(max_tokens=max_tokens, seed=1),
            "budget_s": 60.0,
            **fields,
        }
    )


@asynccontextmanager
async def told_of(
    decode: Link[WorkerEvent], made: World, prefill: Link[WorkerEvent], kv_address: str = ""
) -> AsyncGenerator[str, None]:
    """The decode worker knows the prefill worker, with its KV door at `kv_address` or where it
    says; yields where it says."""
    async with prefill.open(Watch(())) as events:
        watched = await anext(aiter(events))
    assert isinstance(watched, Watched)
    peer = Peer(
        name="weur-prefill",
        role="prefill",
        url=made.processes["weur-prefill"].url,
        kv_address=kv_address or watched.kv_address,
    )
    async with decode.open(Watch((peer,))) as events:
        assert isinstance(await anext(aiter(events)), Watched)
        yield watched.kv_address


def ids(events: Sequence[WorkerEvent]) -> list[int]:
    return [it for event in events if isinstance(event, wire.Tokens) for it in event.ids]


def sse_error(heard: Heard) -> str:
    """The message of the one error that a stream ended with."""
    [frame] = heard.errors
    [error] = frame["errors"]
    return str(error["message"])


async def status_of(response: httpx2.Response) -> tuple[int, int]:
    """HTTP status and public code of a refusal."""
    body = response.json()
    assert body["success"] is False
    return response.status_code, body["errors"][0]["code"]
