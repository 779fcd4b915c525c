"""The server processes of a fleet: started, watched, started again when they die, stopped together.

Their listening sockets are bound here and inherited, so no port is lost between two lives of a
process, and nobody else can take it. Knows nothing of what the processes serve, but `GET /ready`.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx2
from anyio.abc import Process, TaskGroup

from routing.region import Role

BACKLOG = 2048
POLL_S = 0.1
POLL_TIMEOUT_S = 1.0
TERM_S = 4.0  # what a process has between being told to cut what it does, and SIGKILL
KILL_S = 0.8
# Who is told to stop first: with nobody before it that asks, the next has nothing left to do.
STAGES: tuple[tuple[Role, ...], ...] = (("edge",), ("front",), ("prefill", "decode", "both"))
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a process is started again
LONG_LIFE_S = 60.0  # after which a death is not one of a series
TAIL_LINES = 15
FULL_BYTES = 1 << 16  # a disk with less takes no log


class DiedStarting(Exception):
    """A process ended, or stayed unready, while the fleet was starting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One process to keep running. `words` lack only `--fd N`."""

    name: str
    region: str
    role: Role
    words: Sequence[str]
    listener: socket.socket
    log: Path
    other_model: str | None = None  # of a worker that has not the fleet's

    @property
    def url(self) -> str:
        return url_of(self.listener)


class Child:
    """One command, and the process that runs it now."""

    def __init__(self, command: Command, process: Process, started: float) -> None:
        self.command = command
        self.process = process
        self.started = started
        self.retired = False  # it is to end, and not to be started again


class Children:
    """Owner of the processes. `say` gets a line of news, `changed` is called when a pid changes."""

    def __init__(
        self,
        commands: Sequence[Command],
        environ: Mapping[str, str],
        *,
        say: Callable[[str], None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._commands = list(commands)
        self._environ = environ
        self._say = say
        self._changed = changed
        self._children: list[Child] = []
        self._draining: anyio.CancelScope | None = None
        self._is_cut = False
        self._keeping: TaskGroup | None = None  # while they are kept

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    async def start(self) -> None:
        """DiedStarting where the machine has no room for all of them."""
        for command in self._commands:
            await self._started(command)

    async def add(self, commands: Sequence[Command], *, within_s: float) -> None:
        """Start these too, and wait until they are ready. DiedStarting, and none of them is left,
        when one never will be."""
        new: list[Child] = []
        try:
            for command in commands:
                child = await self._started(command)
                new.append(child)
            self._changed()
            await self.wait_ready(lambda name: None, within_s=within_s, among=new)
        except DiedStarting:
            await self.retire([child.command.name for child in new], grace_s=0.0)
            for command in commands:
                command.listener.close()
            raise
        for child in new:
            if self._keeping is not None:
                self._keeping.start_soon(self._keep, child)

    async def _started(self, command: Command) -> Child:
        """One more. DiedStarting where the machine has no room for it."""
        try:
            process = await self._spawn(command)
        except OSError as exc:
            raise DiedStarting(f"{command.name} cannot be started: {exc}") from exc
        child = Child(command, process, anyio.current_time())
        self._children.append(child)
        return child

    async def retire(self, names: Collection[str], *, grace_s: float) -> None:
        """End these for good: asked first, then told to cut what they do, then made to."""
        leaving = [child for child in self._children if child.command.name in names]
        for child in leaving:
            child.retired = True
            _send(child, signal.SIGTERM)
        for limit_s, number in ((grace_s, signal.SIGTERM), (TERM_S, signal.SIGKILL)):
            await self._wait_all(limit_s, leaving)
            for child in leaving:
                _send(child, number)
        await self._wait_all(KILL_S, leaving)
        for child in leaving:
            with suppress(ProcessLookupError, PermissionError):  # what it left behind
                os.killpg(child.process.pid, signal.SIGKILL)
            child.command.listener.close()
            self._children.remove(child)
        self._changed()

    def say_again(self, command: Command) -> None:
        """Have the process of this name started with these words, should it have to be again."""
        for child in self._children:
            if child.command.name == command.name:
                child.command = command

    async def wait_ready(
        self,
        on_ready: Callable[[str], None],
        *,
        within_s: float,
        among: Sequence[Child] | None = None,
    ) -> None:
        """Until every process answers `GET /ready` with 200; DiedStarting when one never will."""
        children = self._children if among is None else among
        ready: set[str] = set()
        obituaries: list[str] = []

        async def follow(child: Child) -> None:
            name = child.command.name
            while len(ready) < len(children):
                if child.process.returncode is not None:
                    obituaries.append(_obituary(child))
                    tasks.cancel_scope.cancel()
                if name not in ready and await _is_ready(client, child):
                    ready.add(name)
                    on_ready(name)
                await anyio.sleep(POLL_S)

        async with httpx2.AsyncClient(timeout=POLL_TIMEOUT_S, trust_env=False) as client:
            with anyio.move_on_after(within_s):
                async with anyio.create_task_group() as tasks:
                    for child in children:
                        tasks.start_soon(follow, child)
        if obituaries:
            raise DiedStarting(obituaries[0])
        late = [child.command.name for child in children if child.command.name not in ready]
        if late:
            raise DiedStarting(f"not ready within {within_s:.0f} s: {', '.join(late)}")

    async def keep(self) -> None:
        """Start every process that dies again, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._keeping = tasks
            for child in self._children:
                tasks.start_soon(self._keep, child)
            await anyio.sleep_forever()  # also when all have been retired

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """End every process and what it started: asked first, edges before fronts before workers,
        for all together so long; then told to cut what they still do, and after 4 s made to."""
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(0.0 if self._is_cut else grace_s) as self._draining:
                await self._drain()
            for child in self._children:  # a second signal; both, for whom it is the first
                _send(child, signal.SIGTERM)
                _send(child, signal.SIGINT)
            await self._wait_all(TERM_S)
            # Also those that left something behind in their group, as an engine.
            for child in self._children:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.process.pid, signal.SIGKILL)
            await self._wait_all(KILL_S)

    def cut(self) -> None:
        """Have a `stop` that is under way, or comes, wait for no request."""
        self._is_cut = True
        if self._draining is not None:
            self._draining.cancel()

    async def _drain(self) -> None:
        for roles in STAGES:
            stage = [child for child in self._children if child.command.role in roles]
            for child in stage:
                _send(child, signal.SIGTERM)
            for child in stage:
                await child.process.wait()

    async def _spawn(self, command: Command) -> Process:
        """Start it in a session of its own: ^C at the terminal is for the launcher alone."""
        fd = command.listener.fileno()
        with command.log.open("ab") as log:
            return await anyio.open_process(
                [*command.words, "--fd", str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                pass_fds=(fd,),
                start_new_session=True,
            )

    async def _keep(self, child: Child) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            code = await child.process.wait()
            if child.retired:
                return
            if anyio.current_time() - child.started > LONG_LIFE_S:
                pause_s = FIRST_PAUSE_S
            name = child.command.name
            self._say(f"{name} died ({_how(code)}); starting it again in {pause_s:g} s")
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if child.retired:  # while it was dead
                return
            await self._start_again(child)

    async def _start_again(self, child: Child) -> None:
        """Where the machine has no room for it, it is as dead as before."""
        child.started = anyio.current_time()  # also in vain: that it lived long counts once
        try:
            with anyio.CancelScope(shield=True):  # else a process could start and nobody know it
                child.process = await self._spawn(child.command)
        except OSError as exc:
            self._say(f"{child.command.name} cannot be started: {exc}")
            return
        if child.retired:  # meanwhile, when there was nobody to tell
            _send(child, signal.SIGKILL)
        self._changed()

    async def _wait_all(self, within_s: float, among: Sequence[Child] | None = None) -> None:
        with anyio.move_on_after(within_s):
            for child in self._children if among is None else among:
                await child.process.wait()


def url_of(listener: socket.socket) -> str:
    """Where this machine reaches the process that listens here."""
    host, port = listener.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, on a free port where `port` is taken or not allowed.

    It listens at once: of two sockets that are bound only, both may get the same port. Who calls
    before the process is up waits in the backlog.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as exc:
        if exc.errno not in {errno.EADDRINUSE, errno.EACCES}:
            raise
        return socket.create_server((host, 0), family=family, backlog=BACKLOG)


async def _is_ready(client: httpx2.AsyncClient, child: Child) -> bool:
    try:
        answer = await client.get(f"{child.command.url}/ready")
    except httpx2.TransportError:
        return False
    return answer.status_code == 200


def _send(child: Child, number: signal.Signals) -> None:
    if child.process.returncode is None:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _obituary(child: Child) -> str:
    """How a process ended, with the last it wrote."""
    code = child.process.returncode
    assert code is not None
    lines = child.command.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    full = shutil.disk_usage(child.command.log.parent).free < FULL_BYTES
    nothing = "(it wrote nothing: the disk is full)" if full else "(it wrote nothing)"
    said = "\n".join(f"    {line}" for line in lines or [nothing])
    return f"{child.command.name} ended while starting ({_how(code)}). {child.command.log}:\n{said}"
