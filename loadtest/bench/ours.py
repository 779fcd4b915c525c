"""Edgefire as one of the servers compared: a fleet to be asked, a worker alone to be timed."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from time import perf_counter

import anyio
from anyio.abc import Process

from loadtest.bench.client import Target
from loadtest.bench.memory import watch_memory
from loadtest.bench.servers import (
    FILLING,
    FILLING_OUTPUT,
    FILLING_PROMPT,
    FIRST_WORDS,
    READY_S,
    free_port,
    running,
    wait_up,
)
from origin_gpu.handover import WorkerEvent
from origin_gpu.models import read_assets
from routing import wire
from routing.fleetfile import DATA
from routing.keys import create_key
from routing.link import Link
from routing.paths import paths
from routing.runs import NoFleet, RunningFleet, running_fleet
from routing.secret import make_secret

ACCOUNT = "bench"
MODEL = "@cf/huggingfacetb/smollm2-135m-instruct"  # of the fleet file; any folder can be behind it
POLL_S = 0.05
FIRST_ID = 1000  # below it many tokenizers keep tokens of their own use


class Refused(Exception):
    """A worker answered a request with a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """Edge, front, worker and engine. `environ` sets what is compared: a format of weights, say."""

    name: str
    model_dir: Path
    home: Path  # keys, caches and runs; kept between starts, as an installed fleet's would be
    threads: int
    environ: Mapping[str, str]
    extra: Mapping[str, object]  # of every request's body

    @property
    def version(self) -> str:
        return version("edgefire")

    @property
    def _secret_file(self) -> Path:
        return self.home / "secret"

    @asynccontextmanager
    async def serving(self, log: Path) -> AsyncGenerator[Target, None]:
        words = ["routing", "up", "--fleet", str(DATA / "single.toml"), "--device", "cpu"]
        words += ["--model-dir", str(self.model_dir), "--no-first-run"]
        async with running(self._command(words), log) as process:
            with anyio.fail_after(READY_S):
                fleet = await self._running_fleet()
            await wait_up(process, f"{fleet.edge.url}/ready")
            key = create_key(Path(fleet.keys_dir), {}, ACCOUNT)
            url = f"{fleet.edge.url}/client/v4/accounts/{ACCOUNT}/ai/v1"
            yield Target(url=url, model=MODEL, token=key, extra=self.extra)

    async def first_token_s(self, log: Path) -> float:
        began, port = perf_counter(), free_port()
        async with (
            running(self._worker_command(port), log) as process,
            self._connected(process, port) as worker,
        ):
            return await worker.ask(FIRST_WORDS, 1) - began

    async def peak_bytes(self, log: Path) -> int:
        port = free_port()
        async with running(self._worker_command(port), log) as process:
            with watch_memory(process.pid) as peak:
                async with self._connected(process, port) as worker:
                    await worker.fill()
            return peak.pss_bytes

    @asynccontextmanager
    async def _connected(self, process: Process, port: int) -> AsyncGenerator[Worker, None]:
        """A worker with its engine and nobody else, connected to as its front would be."""
        url = f"http://127.0.0.1:{port}"
        await wait_up(process, f"{url}/ready")
        link: Link[WorkerEvent] = Link(url, make_secret(self._secret_file), WorkerEvent)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.run)
            await link.wait_connected()
            yield Worker(link, read_assets(self.model_dir).digest)
            tasks.cancel_scope.cancel()

    def _worker_command(self, port: int) -> list[str]:
        make_secret(self._secret_file)
        words = ["origin_gpu", "worker", "--name", "bench", "--region", "bench", "--role", "both"]
        words += ["--model", MODEL, "--model-dir", str(self.model_dir), "--device", "cpu"]
        words += ["--secret-file", str(self._secret_file), "--port", str(port)]
        return self._command([*words, "--threads", str(self.threads)])

    async def _running_fleet(self) -> RunningFleet:
        state = paths({"EDGEFIRE_HOME": str(self.home)}).state
        while True:
            try:
                return running_fleet(state)
            except NoFleet:
                await anyio.sleep(POLL_S)

    def _command(self, words: Sequence[str]) -> list[str]:
        settings = [f"{name}={value}" for name, value in self.environ.items()]
        home = f"EDGEFIRE_HOME={self.home}"
        return ["env", home, *settings, sys.executable, "-m", *words]


class Worker:
    """The other end of a link, which is asked in ids."""

    def __init__(self, link: Link[WorkerEvent], tokenizer_digest: str) -> None:
        self._link = link
        self._digest = tokenizer_digest
        self._numbers = count()

    async def fill(self) -> None:
        """Requests that have nearly all of the KV in use at once."""
        async with anyio.create_task_group() as tasks:
            for _ in range(FILLING):
                tasks.start_soon(self.ask, FILLING_PROMPT, FILLING_OUTPUT)

    async def ask(self, num_prompt: int, num_output: int) -> float:
        """When the first id of the answer came; the answer is read to its end."""
        number = next(self._numbers)
        request = wire.Generate(
            request_id=f"bench-{number}",
            tenant_salt=b"",
            model=MODEL,
            tokenizer_digest=self._digest,
            token_ids=tuple(FIRST_ID + number + at for at in range(num_prompt)),
            sampling=wire.Sampling(max_tokens=num_output, seed=0, temperature=0.0),
            budget_s=READY_S,
        )
        first = 0.0
        async with self._link.open(request) as events:
            async for event in events:
                if isinstance(event, wire.Fault):
                    raise Refused(f"{event.code}: {event.detail}")
                if isinstance(event, wire.Tokens):
                    first = first or perf_counter()
        return first
