"""Runs of a fleet on this machine: a folder each, and which one is running now.

state/run/ID/   fleet.json (what is running), edge.json (what the edge reads), secret, logs/
                lock: its launcher holds it, however it ends
state/run/latest    ID of the run that is up, gone after a clean stop
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from routing.region import Role

FILE = "fleet.json"
LOCK = "lock"


class RunningProcess(Struct, frozen=True, kw_only=True):
    name: str
    region: str  # empty for an edge
    role: Role
    pid: int
    url: str


class RunningFleet(Struct, frozen=True, kw_only=True):
    """What `fleet up` started: enough to ask every process how it is."""

    run: str
    launcher: int  # process id
    model: str
    secret_file: str
    keys_dir: str
    logs: str
    control: str = ""  # host:port where the launcher listens; see `control`
    processes: tuple[RunningProcess, ...]  # the edge first

    @property
    def edge(self) -> RunningProcess:
        return next(process for process in self.processes if process.role == "edge")


class NoFleet(Exception):
    """No fleet is running here."""


def new_run(state: Path) -> Path:
    """An empty folder for one run, for its owner alone."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = state / "run" / f"{now}-{secrets.token_hex(2)}"
    (folder / "logs").mkdir(parents=True)
    folder.chmod(0o700)
    return folder


def say_running(folder: Path, fleet: RunningFleet) -> None:
    """Write what runs, and make this run the latest."""
    _replace(folder / FILE, msgspec.json.format(msgspec.json.encode(fleet)))
    _replace(folder.parent / "latest", folder.name.encode())


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run is one that is up, until its launcher leaves this, or dies."""
    with (folder / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say_stopped(folder: Path) -> None:
    """No longer the latest, unless another run has become it since: that is the newest still up."""
    latest = folder.parent / "latest"
    with suppress(FileNotFoundError):
        if latest.read_text() != folder.name:
            return
        others = (it for it in folder.parent.glob(f"*/{LOCK}") if it.parent != folder)
        up = max((it.parent.name for it in others if _is_held(it)), default=None)
        if up is None:
            latest.unlink()
        else:
            _replace(latest, up.encode())


def _is_held(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def running_fleet(state: Path) -> RunningFleet:
    """The latest run's. NoFleet after a clean stop, or when there never was one."""
    try:
        run = (state / "run" / "latest").read_text()
        encoded = (state / "run" / run / FILE).read_bytes()
    except FileNotFoundError as exc:
        where = state / "run"
        raise NoFleet(f"no fleet is running (looked in {where}): start one by fleet up") from exc
    return msgspec.json.decode(encoded, type=RunningFleet)


def _replace(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never half of either."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(draft).replace(path)
    except OSError:
        Path(draft).unlink()
        raise
