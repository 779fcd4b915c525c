"""What happens to the processes of a soak, from a seed: SIGKILL, and SIGSTOP for some time."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio

from loadtest.bench.soak.clients import now
from loadtest.bench.soak.fleet import Fleet
from routing.children import Child

SHORTEST_S, LONGEST_S = 0.1, 14.0  # of a pause: from a hiccup to longer than links wait, 10 s
KINDS = ("edge", "front", "prefill", "decode", "engine")
WEIGHTS = (2, 2, 3, 3, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    what: Literal["kill", "pause"]
    kind: str  # of KINDS
    name: str  # of the process; of an engine, its worker's
    at: float  # Unix seconds
    length_s: float = 0.0


class Faults:
    """Does things to a fleet, and remembers them."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.done: list[Fault] = []
        self._fleet = fleet
        self._chance = random.Random(f"{seed}/faults")
        self._paused: set[int] = set()

    async def run(self, every_s: float) -> None:
        """One every so often on average, until cancelled. Nothing stays paused."""
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.sleep(self._chance.expovariate(1 / every_s))
                await self._disturb(tasks)

    async def _disturb(self, tasks: anyio.abc.TaskGroup) -> None:
        """Draws the same numbers whatever is found, so a seed means one course of things."""
        kind = self._chance.choices(KINDS, WEIGHTS)[0]
        which, kills = self._chance.random(), self._chance.random() < 0.5
        length_s = SHORTEST_S * (LONGEST_S / SHORTEST_S) ** self._chance.random()
        targets = list(self._targets(kind))
        if not targets:
            return
        name, pid = targets[int(which * len(targets))]
        if pid is None or pid in self._paused:
            return
        if kills:
            self._note("kill", kind, name, 0.0)
            _send(pid, signal.SIGKILL)
        else:
            tasks.start_soon(self._pause, kind, name, pid, length_s)

    def _targets(self, kind: str) -> Iterator[tuple[str, int | None]]:
        """Those of a kind; no process id of one that is down."""
        for child in self._fleet.children:
            role = child.command.role
            if role == kind:
                yield child.command.name, _pid(child)
            elif kind == "engine" and role in {"prefill", "decode"}:
                yield child.command.name, _engine(_pid(child))

    async def _pause(self, kind: str, name: str, pid: int, length_s: float) -> None:
        self._note("pause", kind, name, length_s)
        self._paused.add(pid)
        _send(pid, signal.SIGSTOP)
        try:
            await anyio.sleep(length_s)
        finally:
            _send(pid, signal.SIGCONT)
            self._paused.discard(pid)

    def _note(self, what: Literal["kill", "pause"], kind: str, name: str, length_s: float) -> None:
        self.done.append(Fault(what=what, kind=kind, name=name, at=now(), length_s=length_s))


def _pid(child: Child) -> int | None:
    return child.process.pid if child.process.returncode is None else None


def _engine(worker: int | None) -> int | None:
    """The process id of a worker's engine, while there is one."""
    if worker is None:
        return None
    try:
        pids = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    except OSError:
        return None
    return int(pids[0]) if len(pids) == 1 else None


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
