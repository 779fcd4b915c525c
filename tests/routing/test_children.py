"""The processes of a fleet, with stand-ins for its servers: started, kept, and none left over."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import httpx2
import psutil
import pytest
from anyio.abc import Process

import routing.children
from routing.children import Child, Children, Command, DiedStarting, bind, url_of
from routing.region import Role
from tests.fakes.stand_in_fleet import stand_in

pytestmark = pytest.mark.system
PATIENCE_S = 60.0  # on a busy machine; nothing here waits so long when it goes well


class News:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.changes = anyio.Event()

    def changed(self) -> None:
        self.changes.set()


@asynccontextmanager
async def started(news: News, *commands: Command) -> AsyncIterator[Children]:
    children = Children(commands, os.environ, say=news.lines.append, changed=news.changed)
    try:
        await children.start()
        yield children
    finally:
        await children.stop()
        for child in children:
            child.command.listener.close()
            assert child.process.returncode is not None
            assert not psutil.pid_exists(child.process.pid)


async def test_ready_processes_stop_when_asked(tmp_path: Path) -> None:
    ready: list[str] = []
    pair = [stand_in(name, "front", tmp_path) for name in ("a", "b")]
    async with started(News(), *pair) as children:
        await children.wait_ready(ready.append, within_s=PATIENCE_S)
        assert sorted(ready) == ["a", "b"]
    assert [child.process.returncode for child in children] == [0, 0]


async def test_a_death_while_starting_is_told_with_what_was_written(tmp_path: Path) -> None:
    pair = stand_in("well", "front", tmp_path), stand_in("ill", "both", tmp_path, "dies")
    async with started(News(), *pair) as children:
        with pytest.raises(DiedStarting) as death:
            await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
    assert "ill ended while starting (exit code 1)" in str(death.value)
    assert "no weights here" in str(death.value)


async def test_a_process_that_is_never_ready_is_named(tmp_path: Path) -> None:
    async with started(News(), stand_in("slow", "both", tmp_path, "never-ready")) as children:
        with pytest.raises(DiedStarting, match="not ready within 1 s: slow"):
            await children.wait_ready(lambda _: None, within_s=1)


async def test_a_death_that_a_full_disk_keeps_quiet_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.children, "FULL_BYTES", 1 << 62)  # as if the disk had less
    quiet = Command(
        name="a",
        region="weur",
        role="front",
        words=[sys.executable, "-c", "raise SystemExit(1)"],
        listener=bind("127.0.0.1", 0),
        log=tmp_path / "a.log",
    )
    async with started(News(), quiet) as children:
        with pytest.raises(DiedStarting, match="it wrote nothing: the disk is full"):
            await children.wait_ready(lambda name: None, within_s=PATIENCE_S)


async def test_a_process_that_dies_is_started_again_at_the_same_address(tmp_path: Path) -> None:
    news = News()
    async with started(news, stand_in("phoenix", "both", tmp_path)) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        (child,) = children
        first = child.process.pid
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(children.keep)
            os.kill(first, signal.SIGKILL)
            with anyio.fail_after(PATIENCE_S):
                await news.changes.wait()
                await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
            tasks.cancel_scope.cancel()
        assert child.process.pid != first
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
            assert (await client.get(f"{child.command.url}/ready")).status_code == 200
    assert news.lines == ["phoenix died (SIGKILL); starting it again in 0.5 s"]


async def test_one_that_is_retired_while_it_is_dead_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.children, "FIRST_PAUSE_S", 0.2)
    news = News()
    pair = stand_in("stays", "both", tmp_path), stand_in("leaves", "both", tmp_path)
    async with started(news, *pair) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        stays, leaves = children
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(children.keep)
            os.kill(leaves.process.pid, signal.SIGKILL)
            with anyio.fail_after(PATIENCE_S):
                while not news.lines:
                    await anyio.sleep(0.005)
            await children.retire(["leaves"], grace_s=PATIENCE_S)
            await is_kept(stays)
            tasks.cancel_scope.cancel()
        assert [child.command.name for child in children] == ["stays"]


async def test_one_that_is_retired_while_it_is_started_again_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.children, "FIRST_PAUSE_S", 0.0)
    news, begun, may_end = News(), anyio.Event(), anyio.Event()
    pair = stand_in("stays", "both", tmp_path), stand_in("leaves", "both", tmp_path)
    async with started(news, *pair) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        stays, leaves = children
        spawn, first = children._spawn, leaves.process.pid

        async def slowly(command: Command) -> Process:
            process = await spawn(command)
            if command is leaves.command:
                begun.set()
                await may_end.wait()
            return process

        monkeypatch.setattr(children, "_spawn", slowly)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(children.keep)
            os.kill(leaves.process.pid, signal.SIGKILL)
            with anyio.fail_after(PATIENCE_S):
                await begun.wait()
            await children.retire(["leaves"], grace_s=PATIENCE_S)
            may_end.set()
            with anyio.fail_after(PATIENCE_S):
                while leaves.process.pid == first:
                    await anyio.sleep(0.005)
                assert await leaves.process.wait() == -signal.SIGKILL
            await is_kept(stays)
            tasks.cancel_scope.cancel()


async def test_one_that_lived_long_and_cannot_be_started_again_is_tried_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.children, "FIRST_PAUSE_S", 0.01)
    news = News()
    async with started(news, stand_in("w", "both", tmp_path)) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        (child,) = children
        child.started -= 2 * routing.children.LONG_LIFE_S
        fails_at_first(children, monkeypatch, times=3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(children.keep)
            await is_kept(child)
            tasks.cancel_scope.cancel()
    assert "w cannot be started: [Errno 11] no more processes" in news.lines
    pauses = [line.rpartition(" in ")[2] for line in news.lines if "again in" in line]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s", "0.08 s"]


async def test_some_more_that_cannot_be_started_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [stand_in(name, "both", tmp_path) for name in ("b", "c", "d")]
    async with started(News(), stand_in("a", "both", tmp_path)) as children:
        fails_at_first(children, monkeypatch, after=1)
        with pytest.raises(DiedStarting, match="c cannot be started"):
            await children.add(more, within_s=PATIENCE_S)
        assert [child.command.name for child in children] == ["a"]
    assert [command.listener.fileno() for command in more] == [-1, -1, -1]


async def is_kept(child: Child) -> None:
    """Whether it is started again when it dies."""
    before = child.process.pid
    os.kill(before, signal.SIGKILL)
    with anyio.fail_after(PATIENCE_S):
        while child.process.pid == before:
            await anyio.sleep(0.005)


def fails_at_first(
    children: Children, monkeypatch: pytest.MonkeyPatch, after: int = 0, times: int = 1
) -> None:
    """Have starts fail, as on a machine that has no room for one process more."""
    spawn, calls = children._spawn, itertools.count()

    async def tried(command: Command) -> Process:
        if after <= next(calls) < after + times:
            raise OSError(errno.EAGAIN, "no more processes")
        return await spawn(command)

    monkeypatch.setattr(children, "_spawn", tried)


async def test_edges_are_gone_before_fronts_are_told_and_fronts_before_workers(
    tmp_path: Path,
) -> None:
    roles: list[tuple[str, Role]] = [("w", "decode"), ("f", "front"), ("e", "edge")]
    three = [stand_in(name, role, tmp_path, "says-when-told") for name, role in roles]
    async with started(News(), *three) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        await children.stop(grace_s=PATIENCE_S)
        assert [child.process.returncode for child in children] == [0, 0, 0]
    (worker, front, edge) = [[float(word) for word in one.log.read_text().split()] for one in three]
    assert edge[0] < edge[1] < front[0] < front[1] < worker[0]


async def test_who_has_no_patience_cuts_all_at_once(tmp_path: Path) -> None:
    pair = [stand_in("e", "edge", tmp_path, "slow"), stand_in("w", "both", tmp_path, "slow")]
    async with started(News(), *pair) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(children.stop, grace_s=10 * PATIENCE_S))
            await anyio.wait_all_tasks_blocked()
            children.cut()
        assert [child.process.returncode for child in children] == [0, 0]


async def test_one_that_will_not_stop_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.children, "TERM_S", 0.5)
    mule = stand_in("mule", "both", tmp_path, "stubborn", "leaves-a-child")
    async with started(News(), mule) as children:
        await children.wait_ready(lambda _: None, within_s=PATIENCE_S)
        grandchild = int(mule.log.read_text().split()[1])
        assert psutil.pid_exists(grandchild)
    (child,) = children
    assert child.process.returncode == -signal.SIGKILL
    with anyio.fail_after(PATIENCE_S):
        while still_runs(grandchild):
            await anyio.sleep(0.01)


def still_runs(pid: int) -> bool:
    """Whether it still runs. A zombie that nobody has collected yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_busy_port_gives_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with bind("127.0.0.1", port) as listener:
            assert listener.getsockname()[1] not in {0, port}


def test_a_free_port_is_the_one_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with bind("127.0.0.1", port) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{port}"


def test_two_fleets_never_share_a_port() -> None:
    """Neither has a process that accepts yet."""
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        assert first.getsockname() != second.getsockname()


def test_an_address_that_means_everywhere_is_called_on_loopback() -> None:
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
