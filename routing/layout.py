"""Which processes a fleet is, with their command lines and listening sockets. Starts none of them.

The flags are those of `python -m edge serve`, `python -m origin_gpu front` and `... worker`.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from routing.children import Command, bind
from routing.drain import GRACE_S
from routing.fleetfile import Device, FleetFile, FleetFileError, RegionRow, WorkerRow, resolved
from routing.region import Role

LOOPBACK = "127.0.0.1"
# Passed on as they are where a fleet file names them; else the worker's own default holds.
WORKER_FLAGS = (
    "dtype", "kv_tokens", "max_step_tokens", "max_running", "max_waiting", "lease_s", "kv_ways",
    "host_cache_bytes", "disk_cache_dir", "disk_cache_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What every process of one run is told."""

    folder: Path  # of the run
    keys_dir: Path
    cache_dir: Path
    model_dir: Path  # of the fleet's model
    device: Device
    usage_dir: Path  # for the ledger, the journals and the store
    cores: int
    say: Callable[[str], None]  # takes a line of news
    grace_s: float = GRACE_S  # that fronts and workers leave requests; an edge's is in its file
    other_dirs: Mapping[str, Path] = field(default_factory=dict)  # of other models, by name

    @property
    def secret_file(self) -> Path:
        return self.folder / "secret"

    @property
    def edge_file(self) -> Path:
        """The resolved fleet, as the edge reads it."""
        return self.folder / "edge.json"

    def command(
        self, name: str, region: str, role: Role, listener: socket.socket, words: Sequence[str]
    ) -> Command:
        grace = () if role == "edge" else ("--grace-s", str(self.grace_s))
        return Command(
            name=name,
            region=region,
            role=role,
            words=(
                *(sys.executable, "-m", *words, "--name", name),
                *("--secret-file", str(self.secret_file)),
                *grace,
            ),
            listener=listener,
            log=self.folder / "logs" / f"{name}.log",
        )


def lay_out(fleet: FleetFile, ground: Ground) -> list[Command]:
    """Every process of the fleet, the edge first; writes the fleet file that the edge reads.

    FleetFileError for a host that is none of this machine's.
    """
    try:
        at = _listen(fleet.edge.host, fleet.edge.port, "the edge", ground.say)
    except OSError as exc:
        raise FleetFileError(f"edge: host: {exc.strerror}") from exc
    words = ["edge", "serve", "--fleet", str(ground.edge_file)]
    words += ["--keys-dir", str(ground.keys_dir), "--cache-dir", str(ground.cache_dir)]
    words += ["--ledger", str(ground.usage_dir / "ledger.sqlite")]
    words += ["--store", str(ground.usage_dir / "store.sqlite")]
    commands = [ground.command("edge-0", "", "edge", at, words)]
    fronts: dict[str, str] = {}
    for region in fleet.regions:
        workers = list(_workers(region, fleet.fleet.model, ground))
        front = _front(region, workers, ground)
        fronts[region.name] = front.url
        commands += [front, *workers]
    ground.edge_file.write_bytes(resolved(fleet, fronts))
    return commands


def _front(region: RegionRow, workers: Sequence[Command], ground: Ground) -> Command:
    at = _listen(LOOPBACK, region.port, f"{region.name}-front", ground.say)
    return front_command(region.name, workers, ground, at)


def front_command(
    region: str, workers: Sequence[Command], ground: Ground, listener: socket.socket
) -> Command:
    """The front of a region that has these workers."""
    name = f"{region}-front"
    words = ["origin_gpu", "front", "--region", region]
    for worker in workers:
        words += ["--worker", f"{worker.name}={worker.role}@{worker.url}"]
    words += ["--journal", str(ground.usage_dir / f"journal-{name}.sqlite")]
    return ground.command(name, region, "front", listener, words)


def _workers(region: RegionRow, model: str, ground: Ground) -> Iterator[Command]:
    numbers: Counter[str] = Counter()
    for row in region.workers:
        for _ in range(row.count):
            kind = _other(row, model) or row.role
            yield worker_command(region.name, row, numbers[kind], model, ground)
            numbers[kind] += 1


def worker_command(region: str, row: WorkerRow, number: int, model: str, ground: Ground) -> Command:
    """A worker as `row` has it, the one of that number among those of its role, or of its model
    where that is not the fleet's."""
    other = _other(row, model)
    words = ["origin_gpu", "worker", "--region", region, "--role", row.role]
    model_dir = ground.other_dirs[other] if other else ground.model_dir
    words += ["--model", other or model, "--model-dir", str(model_dir)]
    words += _worker_flags(row, ground)
    kind = row.role if other is None else other.rpartition("/")[2]
    command = ground.command(
        f"{region}-{kind}-{number}", region, row.role, bind(LOOPBACK, 0), words
    )
    return replace(command, other_model=other)


def _other(row: WorkerRow, model: str) -> str | None:
    """The worker's own model, if it is not the fleet's `model`."""
    return None if row.model == model else row.model


def _worker_flags(row: WorkerRow, ground: Ground) -> list[str]:
    words = ["--device", row.device or ground.device]
    words += ["--threads", str(row.threads or ground.cores)]
    for name in WORKER_FLAGS:
        value = getattr(row, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _listen(host: str, port: int, name: str, say: Callable[[str], None]) -> socket.socket:
    """A socket on `port`, or on a free one, which is said."""
    listener = bind(host, port)
    taken = listener.getsockname()[1]
    if port and taken != port:
        say(f"Port {port} is in use: {name} listens on {taken}")
    return listener
