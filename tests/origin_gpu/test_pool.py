"""What a front knows of its workers, and tells them of each other. Real links, fake workers."""

from __future__ import annotations

import anyio
import pytest

from origin_gpu.handover import Watch
from origin_gpu.pool import Charge, Member, Pool
from origin_gpu.settings import WorkerAt, parse_worker
from routing.serving import listening_socket
from tests.fakes.region import BRISK, SECRET, FakeWorker
from tests.fakes.serving import Serving


async def wait_for(pool: Pool, names: set[str]) -> None:
    with anyio.fail_after(10):
        while {it.name for it in pool.candidates()} != names:
            await anyio.sleep(0.005)


def pool_of(*workers: FakeWorker) -> Pool:
    return Pool([WorkerAt(name=w.name, role=w.role, url=w.url) for w in workers], SECRET, BRISK)


async def start(tasks: anyio.abc.TaskGroup, *workers: FakeWorker) -> dict[str, Serving]:
    servers = {}
    for worker in workers:
        servers[worker.name] = Serving(worker.app)
        worker.url = servers[worker.name].url
        await servers[worker.name].start(tasks)
    return servers


async def test_every_worker_learns_of_every_worker() -> None:
    workers = [FakeWorker(f"w{n}", "prefill" if n % 2 else "decode") for n in range(5)]
    async with anyio.create_task_group() as tasks:
        servers = await start(tasks, *workers)
        pool = pool_of(*workers)
        tasks.start_soon(pool.run)
        await wait_for(pool, {w.name for w in workers})
        with anyio.fail_after(10):
            while any(len(w.peers) < 5 for w in workers):
                await anyio.sleep(0.005)
        for worker in workers:
            assert {(p.name, p.role, p.url, p.kv_address) for p in worker.peers} == {
                (w.name, w.role, w.url, f"{w.name}:1") for w in workers
            }
            assert worker.open["Watch"] == 1  # what was asked before has been hung up
        for server in servers.values():
            await server.stop()
        tasks.cancel_scope.cancel()


async def test_a_worker_that_restarts_is_away_and_then_back_with_its_new_address_told() -> None:
    stays, restarts = FakeWorker("stays", "decode"), FakeWorker("restarts", "prefill")
    async with anyio.create_task_group() as tasks:
        servers = await start(tasks, stays, restarts)
        pool = pool_of(stays, restarts)
        tasks.start_soon(pool.run)
        await wait_for(pool, {"stays", "restarts"})
        await servers["restarts"].stop()
        await wait_for(pool, {"stays"})
        assert [it.name for it in pool.reports()] == ["stays"]

        again = FakeWorker("restarts", "prefill", kv_address="elsewhere:2", url=restarts.url)
        port = int(restarts.url.rsplit(":", 1)[1])
        server = Serving(again.app, listening_socket("127.0.0.1", port))
        await server.start(tasks)
        await wait_for(pool, {"stays", "restarts"})
        with anyio.fail_after(10):
            while "elsewhere:2" not in {p.kv_address for p in stays.peers}:
                await anyio.sleep(0.005)
        for each in (servers["stays"], server):
            await each.stop()
        tasks.cancel_scope.cancel()


async def test_a_worker_counts_as_it_said_last() -> None:
    worker = FakeWorker("w", "both", max_waiting=10, waiting=4)
    async with anyio.create_task_group() as tasks:
        servers = await start(tasks, worker)
        pool = pool_of(worker)
        tasks.start_soon(pool.run)
        await wait_for(pool, {"w"})
        assert [it.room for it in pool.candidates()] == [6]
        assert pool.candidates(excluding={"w"}) == []
        worker.ready = False
        worker.say()
        await wait_for(pool, set())
        assert len(pool.reports()) == 1  # it is here, if not ready
        await servers["w"].stop()
        tasks.cancel_scope.cancel()


async def test_a_watch_that_a_worker_ends_is_opened_again() -> None:
    worker = FakeWorker("w", "both")
    refusals = iter([True, True])
    watch = worker._watch

    async def end_at_first(stream: object, request: Watch) -> None:
        if not next(refusals, False):
            await watch(stream, request)  # type: ignore[arg-type]

    worker._watch = end_at_first  # type: ignore[assignment, method-assign]
    async with anyio.create_task_group() as tasks:
        servers = await start(tasks, worker)
        pool = pool_of(worker)
        tasks.start_soon(pool.run)
        await wait_for(pool, {"w"})
        await servers["w"].stop()
        tasks.cancel_scope.cancel()


async def test_a_link_that_is_lost_as_soon_as_it_is_there_is_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = FakeWorker("w", "both")
    async with anyio.create_task_group() as tasks:
        servers = await start(tasks, worker)
        pool = pool_of(worker)
        link = pool.members["w"].link
        wait_connected, lost = link.wait_connected, list[anyio.Event]()

        async def wait_and_lose() -> None:
            if lost:  # it is back
                link._online = lost[0]
            await wait_connected()
            if not lost:  # between the wake of who waits for it and his turn
                lost.append(link._online)
                link._online = anyio.Event()

        monkeypatch.setattr(link, "wait_connected", wait_and_lose)
        tasks.start_soon(pool.run)
        await wait_for(pool, {"w"})
        await servers["w"].stop()
        tasks.cancel_scope.cancel()


def test_a_charge_ends_once() -> None:
    member = Member.__new__(Member)
    member.tokens_in_flight, member.num_charged = 5, 1
    with Charge(member, 100) as charge:
        assert (member.tokens_in_flight, member.num_charged) == (105, 2)
        charge.end()
        assert (member.tokens_in_flight, member.num_charged) == (5, 1)
    assert (member.tokens_in_flight, member.num_charged) == (5, 1)


def test_a_worker_is_named_on_the_command_line() -> None:
    assert parse_worker("weur-prefill-0=prefill@http://127.0.0.1:81/") == WorkerAt(
        name="weur-prefill-0", role="prefill", url="http://127.0.0.1:81"
    )


@pytest.mark.parametrize(
    "text",
    ["", "w", "w=prefill", "w@http://h:1", "w=boss@http://h:1", "w=both@h:1", "=both@http://h"],
)
def test_a_worker_named_wrongly_is_refused_with_what_was_said(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)[1:-1] or "NAME=ROLE@URL"):
        parse_worker(text)
