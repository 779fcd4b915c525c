"""`fleet up`: from a fleet file to running processes on this machine, and back to none.

Knows the order of things. Which processes there are says `layout`, how they live `children`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import anyio
import msgspec

from routing.children import Children, Command, DiedStarting
from routing.control import listen
from routing.engines import engine_lines
from routing.firstrun import Caller, FirstRunFailed, body, curl_line, first_run
from routing.fleetfile import DATA, Device, FleetFile
from routing.keys import create_key
from routing.layout import Ground, lay_out
from routing.paths import Paths
from routing.preflight import GB, LEAST_MEMORY_BYTES, SMALL_MEMORY_BYTES
from routing.region import Task
from routing.runs import RunningFleet, RunningProcess, held, new_run, say_running, say_stopped
from routing.scale import Scaler
from routing.screen import Screen
from routing.secret import make_secret, read_secret

READY_WITHIN_S = 900.0  # loading a large model from a slow disk
ACCOUNT = "demo"
CUT_S = 5.0  # that an edge whose grace is over takes to be gone
FAILED, INTERRUPTED = 1, 130  # 130: what a shell says of a program ended by ^C


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    paths: Paths
    environ: Mapping[str, str]  # what the processes inherit
    device: Device = "auto"
    once: bool = False  # stop after the first answer
    first_run: bool = True
    cores: int = 1

    @property
    def keys_dir(self) -> Path:
        return self.paths.config / "keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run about to start: nothing is left that could be missing."""

    folder: Path
    secret_file: Path
    model: str
    commands: list[Command]  # the edge first
    caller: Caller
    fleet: FleetFile
    ground: Ground


def choose_fleet(asked: Path | None, free_memory_bytes: int | None) -> tuple[Path, str | None]:
    """The fleet file to use, and what to say of the choice."""
    if asked is not None:
        return asked, None
    if free_memory_bytes is None or free_memory_bytes >= SMALL_MEMORY_BYTES:
        return DATA / "fleet.toml", None
    free, want = free_memory_bytes / GB, SMALL_MEMORY_BYTES / GB
    said = f"{free:.1f} GB of memory free, under {want:.0f}: one worker instead of two regions"
    if free_memory_bytes < LEAST_MEMORY_BYTES:
        said += ", and even that may swap"
    return DATA / "single.toml", f"{said} (routing/data/single.toml)"


def prepare(
    settings: UpSettings,
    fleet: FleetFile,
    model_dir: Path,
    say: Callable[[str], None],
    *,
    other_dirs: Mapping[str, Path] = MappingProxyType({}),
    task: Task = "text-generation",
) -> Prepared:
    """Everything short of starting: folder, secret, key, sockets, command lines.

    NoKey, FleetFileError of a host that is none of this machine's, or OSError.
    """
    folder = new_run(settings.paths.state)
    ground = Ground(
        folder=folder,
        keys_dir=settings.keys_dir,
        cache_dir=settings.paths.cache,
        model_dir=model_dir,
        other_dirs=other_dirs,
        device=settings.device,
        cores=settings.cores,
        grace_s=fleet.fleet.grace_s,
        say=say,
        usage_dir=settings.paths.state / "usage",
    )
    make_secret(ground.secret_file)
    key = create_key(settings.keys_dir, settings.environ, ACCOUNT)
    commands = lay_out(fleet, ground)
    model = fleet.fleet.model
    caller = Caller(edge_url=commands[0].url, account=ACCOUNT, key=key, model=model, task=task)
    return Prepared(
        folder=folder,
        secret_file=ground.secret_file,
        model=model,
        commands=commands,
        caller=caller,
        fleet=fleet,
        ground=ground,
    )


class Launch:
    """One run of a fleet, from its first process to its last."""

    def __init__(self, settings: UpSettings, prepared: Prepared, screen: Screen) -> None:
        self._settings = settings
        self._prepared = prepared
        self._screen = screen
        self._children = Children(
            prepared.commands,
            settings.environ,
            say=screen.say,
            changed=self._note,
        )
        self._code = INTERRUPTED
        self._control = ""

    async def run(self) -> int:
        """Start, show the first answer, stay until told to stop, stop. The exit code."""
        told = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with held(self._prepared.folder), anyio.open_signal_receiver(*told) as signals:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_act_when_told, signals, tasks.cancel_scope.cancel)
                try:
                    await self._live()
                except (DiedStarting, FirstRunFailed) as exc:
                    self._screen.complain(str(exc))
                    self._code = FAILED
                finally:
                    await self._stop(signals)
                    say_stopped(self._prepared.folder)
                tasks.cancel_scope.cancel()
        return self._code

    async def _stop(self, signals: AsyncIterator[signal.Signals]) -> None:
        self._screen.say("Stopping; Ctrl-C cuts what is still being answered")
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_act_when_told, signals, self._children.cut)
                fleet = self._prepared.fleet
                grace_s = max(fleet.edge_grace_s, fleet.fleet.grace_s)
                await self._children.stop(grace_s=grace_s + CUT_S)
                tasks.cancel_scope.cancel()

    async def _live(self) -> None:
        ready = self._prepared
        await self._children.start()
        self._note()
        names = [command.name for command in ready.commands]
        self._screen.say(f"Starting {len(names)} processes; logs in {ready.folder / 'logs'}")
        with self._screen.starting(names) as on_ready:
            await self._children.wait_ready(on_ready, within_s=READY_WITHIN_S)
        for line in engine_lines(command.log for command in ready.commands):
            self._screen.say(f"Engines: {line}")
        self._screen.result(f"Edge: {ready.caller.edge_url}")
        if self._settings.first_run:
            await self._show_first_run()
        self._code = 0
        if not self._settings.once:
            await self._keep()

    async def _keep(self) -> None:
        """Have what dies started again, and do what other commands ask for."""
        ready = self._prepared
        scaler = Scaler(self._children, ready.fleet, ready.ground, self._screen.say)
        async with anyio.create_task_group() as tasks:
            secret = read_secret(ready.secret_file)
            self._control = await tasks.start(listen, scaler.scale, secret)
            self._note()
            self._say_how_to_call()
            await self._children.keep()

    async def _show_first_run(self) -> None:
        asked = msgspec.json.encode(body(self._prepared.caller.task)).decode()
        self._screen.result(f'\nrun("{self._prepared.model}", {asked})\n')
        outcome = await first_run(self._prepared.caller, partial(self._screen.result, end=""))
        self._screen.result("\n")
        for line in outcome.lines():
            self._screen.result(line)

    def _say_how_to_call(self) -> None:
        caller = self._prepared.caller
        self._screen.result(f"\n{curl_line(caller)}\n\ntoken: {caller.key}")
        self._screen.result(f"\nplayground: {caller.edge_url}/#key={caller.key}")
        self._screen.say("Running until Ctrl-C. In another terminal: .venv/bin/fleet status")

    def _note(self) -> None:
        """Write down what runs, for `fleet status` and whoever else asks."""
        ready = self._prepared
        fleet = RunningFleet(
            run=ready.folder.name,
            launcher=os.getpid(),
            model=ready.model,
            secret_file=str(ready.secret_file),
            keys_dir=str(self._settings.keys_dir),
            logs=str(ready.folder / "logs"),
            control=self._control,
            processes=tuple(
                RunningProcess(
                    name=child.command.name,
                    region=child.command.region,
                    role=child.command.role,
                    pid=child.process.pid,
                    url=child.command.url,
                )
                for child in self._children
            ),
        )
        try:
            say_running(ready.folder, fleet)
        except OSError as exc:  # as where the disk is full: no reason to end what runs
            self._screen.say(f"{ready.folder} cannot be written, so fleet status is behind: {exc}")


async def _act_when_told(signals: AsyncIterator[signal.Signals], act: Callable[[], None]) -> None:
    async for _ in signals:
        act()
