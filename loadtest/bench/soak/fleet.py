"""The fleet of a soak: two regions, two edges, engines whose answers are known; kept running.

Processes that die are started again by `fleet up`'s own supervisor. Knows nothing of traffic and
of faults, but what it is told of deaths.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import httpx2
import msgspec

from loadtest.bench.host_model import make_model
from routing.children import Child, Children, bind
from routing.fleetfile import EdgeRow, FleetFile, FleetRow, RegionRow, WorkerRow
from routing.layout import LOOPBACK, Ground, lay_out
from routing.region import ProcessReport
from routing.secret import bearer, make_secret

MODEL = "@cf/bench/checksum"
REGIONS = ("weur", "enam")
WORKERS = 2  # of each role in each region
BUDGET_S = 40.0  # of a request, at the edges
LEASE_S = 5.0
KV_TOKENS = 960  # of a worker: two long answers at once do not fit
READY_S = 120.0  # on a busy machine
SETTLE_S = 90.0  # a paused peer is given up after 10 s, held KV after LEASE_S


@dataclass(slots=True)
class Fleet:
    """Running processes, and what became known of them."""

    folder: Path
    children: Children
    secret: str
    deaths: list[str] = field(default_factory=list)  # as the supervisor tells them
    pids: set[int] = field(default_factory=set)  # of all that ever ran

    @property
    def usage(self) -> Path:
        return self.folder / "usage"

    @property
    def edges(self) -> list[Child]:
        return [child for child in self.children if child.command.role == "edge"]

    def note(self) -> None:
        self.pids |= {child.process.pid for child in self.children}

    async def wait_ready(self) -> list[str]:
        """Names of those that are not ready within READY_S: none, if all is well."""
        late = [child.command.name for child in self.children]
        async with httpx2.AsyncClient(timeout=2.0, trust_env=False) as client:
            with anyio.move_on_after(READY_S):
                while late:
                    late = [
                        child.command.name
                        for child in self.children
                        if child.command.name in late and not await _is_ready(client, child)
                    ]
                    await anyio.sleep(0.1)
        return late

    async def wait_idle(self) -> list[str]:
        """What is not back where it started within SETTLE_S, in words."""
        busy = ["nothing was asked"]
        async with httpx2.AsyncClient(timeout=5.0, trust_env=False) as client:
            with anyio.move_on_after(SETTLE_S):
                while busy:
                    busy = [
                        said for child in self.children for said in await self._busy(client, child)
                    ]
                    await anyio.sleep(0.1)
        return busy

    async def _busy(self, client: httpx2.AsyncClient, child: Child) -> list[str]:
        command = child.command
        try:
            if command.role in {"edge", "front"}:
                text = (await client.get(f"{command.url}/metrics")).text
                return [f"{command.name}: {line}" for line in not_zero(text)]
            answer = await client.get(f"{command.url}/v1/report", headers=bearer(self.secret))
        except httpx2.TransportError as exc:
            return [f"{command.name}: {type(exc).__name__}"]
        report = msgspec.json.decode(answer.content, type=ProcessReport)
        return [f"{command.name}: {said}" for said in not_idle(report)]


GAUGES = (
    "edgefire_edge_in_flight",
    "edgefire_edge_ledger_pending",
    "edgefire_edge_ledger_lost_total",
    "edgefire_front_in_flight",
    "edgefire_front_worker_tokens",
)


def not_zero(metrics: str) -> list[str]:
    """Lines of gauges that are zero when nothing is going on, and are not."""
    return [
        line
        for line in metrics.splitlines()
        if line.split(" ")[0].partition("{")[0] in GAUGES and float(line.rpartition(" ")[2])
    ]


def not_idle(report: ProcessReport) -> list[str]:
    """What a worker still has."""
    counts = {name: getattr(report, name) for name in ("in_flight", "waiting", "held")}
    counts["blocks in use"] = report.total_blocks - report.free_blocks
    return [f"{count} {name}" for name, count in counts.items() if count]


@asynccontextmanager
async def soaked_fleet(
    folder: Path, environ: Mapping[str, str], *, step_s: float
) -> AsyncGenerator[Fleet, None]:
    """All of it, ready; a process that dies is started again. Stopped when the block is left."""
    (folder / "logs").mkdir(parents=True)
    ground = Ground(
        folder=folder,
        keys_dir=folder / "keys",
        cache_dir=folder / "cache",
        model_dir=make_model(folder / "model"),
        device="cpu",
        cores=1,
        say=lambda line: None,
        usage_dir=folder / "usage",
    )
    secret = make_secret(ground.secret_file)
    engine = [sys.executable, "-m", "loadtest.bench.soak.engine", "--step-s", str(step_s)]
    commands = [
        replace(command, words=(*command.words, "--engine-command", shlex.join(engine)))
        if command.role in {"prefill", "decode"}
        else command
        for command in lay_out(_fleet_file(), ground)
    ]
    first = commands[0]
    words = ["edge-1" if word == first.name else word for word in first.words]
    log = first.log.with_name("edge-1.log")
    second = replace(first, name="edge-1", words=words, listener=bind(LOOPBACK, 0), log=log)
    commands.insert(1, second)
    deaths: list[str] = []
    children = Children(commands, environ, say=deaths.append, changed=lambda: fleet.note())
    fleet = Fleet(folder=folder, children=children, secret=secret, deaths=deaths)
    try:
        await children.start()
        fleet.note()
        await children.wait_ready(lambda name: None, within_s=READY_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(children.keep)
            yield fleet
            tasks.cancel_scope.cancel()
    finally:
        await children.stop()
        for command in commands:
            command.listener.close()


def _fleet_file() -> FleetFile:
    workers = tuple(
        WorkerRow(
            role=role,
            count=WORKERS,
            kv_tokens=KV_TOKENS,
            max_step_tokens=64,
            max_running=16,
            max_waiting=32,
            lease_s=LEASE_S,
        )
        for role in ("prefill", "decode")
    )
    return FleetFile(
        fleet=FleetRow(model=MODEL),
        edge=EdgeRow(port=0, budget_s=BUDGET_S),
        regions=tuple(RegionRow(name=name, workers=workers) for name in REGIONS),
    )


def left_files(pids: set[int], places: Iterable[Path]) -> list[str]:
    """KV files and folders that these processes have left behind."""
    marks = tuple(f"edgefire-kv-{pid}-" for pid in pids)
    found = [path for place in places for path in place.glob("*edgefire-kv-*")]
    return [str(path) for path in found if path.name.lstrip(".").startswith(marks)]


async def _is_ready(client: httpx2.AsyncClient, child: Child) -> bool:
    try:
        return (await client.get(f"{child.command.url}/ready")).status_code == 200
    except httpx2.TransportError:
        return False
