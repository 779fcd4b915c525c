"""A fleet of real processes on loopback for system tests: edge, fronts, workers, engines.

The engines count (tests/fakes/counting_engine.py), so every answer can be worked out by hand: the
prompt "AB" continues "CDE". Everything else is what a user runs.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import httpx2
import msgspec

from routing.region import ProcessReport, RegionReport
from tests.fakes.model_folder import make_counting_folder

ROOT = Path(__file__).parents[2]
MODEL = "@cf/test/counting"
ACCOUNT = "acme"
PLACES = {"weur": (52.37, 4.90), "enam": (40.71, -74.01)}
NEAR_WEUR = {"cf-iplatitude": "48.86", "cf-iplongitude": "2.35"}  # Paris
NEAR_ENAM = {"cf-iplatitude": "42.36", "cf-iplongitude": "-71.06"}  # Boston


@dataclass
class Process:
    name: str
    url: str
    popen: subprocess.Popen[bytes]
    log: Path
    words: tuple[str, ...] = ()  # of its command line, to start another like it

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """End it as an operator does who waits for no request; the exit code."""
        try:
            for _ in range(2):  # the second signal cuts what is left
                if self.popen.poll() is None:
                    self.popen.send_signal(signal.SIGCONT)
                    self.popen.terminate()
                with suppress(subprocess.TimeoutExpired):
                    return self.popen.wait(3)
            return self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise


@dataclass(kw_only=True)
class Shape:
    """What the fleet looks like, and how slow its engines are."""

    regions: tuple[str, ...] = ("weur",)
    roles: tuple[str, ...] = ("prefill", "decode")  # a second one of a role is "prefill-2"
    copies: int = 1  # workers of each role; the second is called weur-prefill-2
    step_s: float = 0.0
    worker_flags: tuple[str, ...] = ()
    front_flags: tuple[str, ...] = ()
    edge_flags: tuple[str, ...] = ()
    folder: Path | None = None  # of a real model for real engines; else they count


@dataclass
class World:
    home: Path
    secret: str
    client: httpx2.AsyncClient
    processes: dict[str, Process] = field(default_factory=dict)
    key: str = ""

    @property
    def edge(self) -> Process:
        return self.processes["edge"]

    @property
    def usage(self) -> Path:
        """The folder of the ledger and of the fronts' journals, where `fleet` has them."""
        return self.home / "state" / "usage"

    def headers(self, near: dict[str, str] = NEAR_WEUR) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", **near}

    def run_url(self, model: str = MODEL, account: str = ACCOUNT) -> str:
        return f"{self.edge.url}/client/v4/accounts/{account}/ai/run/{model}"

    def v1_url(self, route: str = "chat/completions") -> str:
        return f"{self.edge.url}/client/v4/accounts/{ACCOUNT}/ai/v1/{route}"

    def internal(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    async def worker(self, name: str) -> ProcessReport:
        answer = await self.client.get(
            f"{self.processes[name].url}/v1/report", headers=self.internal()
        )
        return msgspec.json.decode(answer.content, type=ProcessReport)

    async def region(self, name: str) -> RegionReport:
        answer = await self.client.get(
            f"{self.processes[f'{name}-front'].url}/v1/report", headers=self.internal()
        )
        return msgspec.json.decode(answer.content, type=RegionReport)

    async def settled(self, *workers: str, within_s: float = 10) -> None:
        """Wait until these workers hold nothing: no request, no block, no hold."""
        with anyio.fail_after(within_s):
            for name in workers:
                while not _idle(report := await self.worker(name)):
                    assert report.free_blocks <= report.total_blocks
                    await anyio.sleep(0.01)

    async def raw(self, prompt: str, max_tokens: int, **fields: object) -> httpx2.Response:
        """A whole answer to `prompt` as it is, without a chat template."""
        body = {"prompt": prompt, "raw": True, "max_tokens": max_tokens, **fields}
        return await self.client.post(self.run_url(), json=body, headers=self.headers())

    @asynccontextmanager
    async def stream(
        self, prompt: str, max_tokens: int, near: dict[str, str] = NEAR_WEUR, **fields: object
    ) -> AsyncIterator[httpx2.Response]:
        body = {"prompt": prompt, "raw": True, "max_tokens": max_tokens, "stream": True, **fields}
        async with self.client.stream(
            "POST", self.run_url(), json=body, headers=self.headers(near)
        ) as response:
            yield response


def _idle(report: ProcessReport) -> bool:
    return (
        report.free_blocks == report.total_blocks
        and report.in_flight == report.waiting == report.held == 0
    )


def counted(prompt: str, num_tokens: int) -> str:
    """What the counting model says after `prompt`: the characters that follow its last one."""
    return "".join(chr(ord(prompt[-1]) + 1 + i) for i in range(num_tokens))


@asynccontextmanager
async def world(home: Path, shape: Shape | None = None) -> AsyncIterator[World]:
    """Everything started and ready. Leaving the block ends it, and checks that it ended well."""
    shape = shape or Shape()
    _more_files(8192)
    secret = home / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a-secret-of-this-test")
    folder = shape.folder or make_counting_folder(home / "model")
    limits = httpx2.Limits(max_connections=2000, max_keepalive_connections=100)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        made = World(home, secret.read_text(), client)
        try:
            _start_regions(made, shape, folder)
            _start_edge(made, shape)
            made.key = edge_key(home, "create", "--account", ACCOUNT)
            await _wait_ready(made)
            yield made
        finally:
            codes = {p.name: p.stop() for p in made.processes.values()}
        assert {c for c in codes.values() if c >= 0} <= {0}, codes


def edge_key(home: Path, *words: str) -> str:
    """`edge key ...`; the last line it prints on standard output."""
    command = [sys.executable, "-m", "edge", "key", *words, "--keys-dir", str(home / "keys")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return (done.stdout.strip().splitlines() or [""])[-1]


def start(made: World, name: str, words: Sequence[str], port: int = 0) -> Process:
    """`python -m ...` on a listening socket of its own; on a former one's `port` to restart it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(2048)
    log = made.home / f"{name}.log"
    command = [sys.executable, "-m", *words, "--name", name, "--fd", str(sock.fileno())]
    with sock, log.open("ab") as out:
        popen = subprocess.Popen(
            command,
            pass_fds=[sock.fileno()],
            stderr=out,
            stdout=out,
            cwd=ROOT,
            env={**os.environ, "EDGEFIRE_HOME": str(made.home), "OMP_NUM_THREADS": "1"},
        )
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    made.processes[name] = Process(name, url, popen, log, tuple(words))
    return made.processes[name]


def worker_words(made: World, shape: Shape, region: str, role: str, folder: Path) -> list[str]:
    engine = f"{sys.executable} {ROOT / 'tests/fakes/counting_engine.py'} --step-s {shape.step_s}"
    role = role.partition("-")[0]  # of the name: several of a role are numbered
    words = ["origin_gpu", "worker", "--region", region, "--role", role, "--model", MODEL]
    words += ["--model-dir", str(folder), "--secret-file", str(made.home / "secret")]
    if shape.folder is not None:
        return [*words, "--dtype", "float32", "--threads", "1", *shape.worker_flags]
    return [*words, "--engine-command", engine, *shape.worker_flags]


def _start_regions(made: World, shape: Shape, folder: Path) -> None:
    for region in shape.regions:
        for role in shape.roles:
            for n in range(1, shape.copies + 1):
                name = f"{region}-{role}" + (f"-{n}" if n > 1 else "")
                start(made, name, worker_words(made, shape, region, role, folder))
        words = front_words(made, region, shape.roles, shape.copies)
        start(made, f"{region}-front", [*words, *shape.front_flags])


def front_words(
    made: World, region: str, roles: Sequence[str] = ("prefill", "decode"), copies: int = 1
) -> list[str]:
    """Of a front whose workers are started. It has short prompts split as well as long ones."""
    words = ["origin_gpu", "front", "--region", region, "--secret-file", str(made.home / "secret")]
    for role in roles:
        for n in range(1, copies + 1):
            name = f"{region}-{role}" + (f"-{n}" if n > 1 else "")
            at = f"{role.partition('-')[0]}@{made.processes[name].url}"
            words += ["--worker", f"{name}={at}"]
    words += ["--local-tokens", "0"]
    return [*words, "--journal", str(made.usage / f"journal-{region}-front.sqlite")]


def edge_words(made: World, fleet: Path) -> list[str]:
    words = ["edge", "serve", "--fleet", str(fleet), "--secret-file", str(made.home / "secret")]
    words += ["--keys-dir", str(made.home / "keys"), "--cache-dir", str(made.home / "cache")]
    words += ["--ledger", str(made.usage / "ledger.sqlite")]
    return [*words, "--store", str(made.usage / "store.sqlite")]


def _start_edge(made: World, shape: Shape) -> None:
    rows = []
    for region in shape.regions:
        latitude, longitude = PLACES[region]
        url = made.processes[f"{region}-front"].url
        rows.append(
            f'[[region]]\nname = "{region}"\nurl = "{url}"\n'
            f"latitude = {latitude}\nlongitude = {longitude}\n"
        )
    fleet = made.home / "fleet.toml"
    fleet.write_text("\n".join(rows))
    start(made, "edge", [*edge_words(made, fleet), *shape.edge_flags])


async def _wait_ready(made: World) -> None:
    """Ready, every process, and every region's report at the edge good enough to be chosen."""
    deadline = time.monotonic() + 60
    for process in made.processes.values():
        while not await _ready(made.client, process):
            assert process.popen.poll() is None, process.log.read_text()[-2000:]
            assert time.monotonic() < deadline, process.log.read_text()[-2000:]
            await anyio.sleep(0.05)


async def _ready(client: httpx2.AsyncClient, process: Process) -> bool:
    try:
        return (await client.get(f"{process.url}/ready")).status_code == 200
    except httpx2.TransportError:
        return False


def _more_files(count: int) -> None:
    """A thousand streams want more file descriptors than a shell gives by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
