"""One worker: who collects its KV, who leaves, and what is free again then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from origin_gpu import engine_link, kv_transfer
from origin_gpu.handover import Collected, Prefill, Prefilled, Resume, WorkerEvent
from origin_gpu.kv_files import KVFiles
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_transfer import DoorTransport
from routing import wire
from routing.errors import Code
from tests.fakes.faulty_way import Faulty, Take
from tests.fakes.tcp_proxy import tcp_proxy
from tests.origin_gpu.local_workers import (
    PATIENCE_S,
    SECRET,
    fault,
    ids,
    local_pair,
    local_worker,
    prefilled_of,
)


def num_files(files: KVFiles) -> int:
    return sum(len(list(folder.glob("*.kv"))) for folder in files._folders)


async def test_kv_that_nobody_collects_goes_after_its_lease(tmp_path: Path) -> None:
    async with local_worker(tmp_path, "p", "prefill", lease_s=0.2) as p:
        events = await p.ask(Prefill(p.generate(65)))
        assert isinstance(events[0], Prefilled)
        assert "0.2 s" in fault(events, Code.LOST)
        await p.settled()


async def test_two_tries_of_one_request_are_told_apart(tmp_path: Path) -> None:
    """A front that asks anew may do so before the worker has dropped the first try."""
    async with local_worker(tmp_path, "p", "prefill") as p:
        request = p.generate(65)
        async with p.link.open(Prefill(request)) as first, p.link.open(Prefill(request)) as second:
            tickets = [(await prefilled_of(it)).ticket for it in (first, second)]
            assert len({ticket.request_id for ticket in tickets if ticket}) == 2
            assert ids(await p.ask(request)) == [66, 67, 68, 69]


@pytest.mark.slow
async def test_a_collector_at_work_keeps_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes twice as long as the lease, and says that it lives."""
    monkeypatch.setattr(kv_transfer, "BUSY_EVERY_S", 0.05)
    async with local_pair(tmp_path, lease_s=1.5) as (p, d):

        async def slowly(take: Take, _: Path) -> None:
            await anyio.sleep(3.0)
            await take()

        ways = [Faulty(SharedFiles(), slowly)]
        d.app.decode._transport = DoorTransport(SECRET, ways=ways)
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            assert ids(await d.ask(Resume(request, prefilled))) == [67, 68]
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]


async def test_a_collector_that_dies_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfer, "BUSY_EVERY_S", 0.05)
    async with local_pair(tmp_path, lease_s=1.5) as (p, d):

        async def never(*_: object) -> None:
            await anyio.sleep_forever()

        d.app.decode._transport = DoorTransport(SECRET, ways=[Faulty(SharedFiles(), never)])
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            async with d.link.open(Resume(request, prefilled)):
                await anyio.sleep(3.0)
                assert p.report.held == 1  # it is still at it
            with anyio.fail_after(PATIENCE_S):
                detail = fault([event async for event in held], Code.LOST)
            assert detail.endswith("for 1.5 s")
        await p.settled()


@pytest.mark.slow
async def test_a_full_queue_refuses(tmp_path: Path) -> None:
    async with local_worker(tmp_path, step_s=0.02, max_running=2, max_waiting=3) as w:
        async with anyio.create_task_group() as tasks:
            answers: list[list[WorkerEvent]] = []

            async def ask() -> None:
                answers.append(await w.ask(w.generate(65, max_tokens=30)))

            for _ in range(8):
                tasks.start_soon(ask)
        refused = [it[0] for it in answers if isinstance(it[0], wire.Fault)]
        assert len(refused) == 3
        assert all(it.code is Code.NO_CAPACITY and it.retry_after_s for it in refused)
        assert "3 requests wait already, 3 may" in refused[0].detail
        assert sorted(len(ids(it)) for it in answers) == [0] * 3 + [30] * 5


async def test_who_never_waits_is_refused_where_all_rows_are_taken(tmp_path: Path) -> None:
    async with (
        local_worker(tmp_path, step_s=0.02, max_running=1) as w,
        w.link.open(w.generate(65, max_tokens=80)) as ahead,
    ):
        assert await anext(aiter(ahead)) == wire.Started(0)
        for more in ({"reject_if_busy": True}, {"priority": -1}):
            detail = fault(await w.ask(w.generate(80, **more)), Code.NO_CAPACITY)
            assert detail == "1 requests run already, 1 may"
        with anyio.fail_after(PATIENCE_S):
            assert len(ids([event async for event in ahead])) == 80
        assert len(ids(await w.ask(w.generate(80, max_tokens=5, reject_if_busy=True)))) == 5


async def test_when_its_time_is_up_a_request_is_dropped(tmp_path: Path) -> None:
    async with local_worker(tmp_path, step_s=0.02) as w:
        events = await w.ask(w.generate(65, max_tokens=5000, budget_s=0.5))
        detail = fault(events, Code.TIMEOUT)
        assert detail.startswith(f"{len(ids(events))} tokens after 0.5 s")
        await w.settled()


async def test_hanging_up_in_the_queue(tmp_path: Path) -> None:
    async with (
        local_worker(tmp_path, step_s=0.02, max_running=1) as w,
        w.link.open(w.generate(65, max_tokens=80)) as ahead,
    ):
        assert await anext(aiter(ahead)) == wire.Started(0)
        async with w.link.open(w.generate(80)):
            await w.until(lambda report: report.waiting == 1)
        after = await w.until(lambda report: report.waiting == 0)
        assert after.in_flight == 1
        with anyio.fail_after(PATIENCE_S):
            assert len(ids([event async for event in ahead])) == 80


@pytest.mark.parametrize("role", ["prefill", "both"])
async def test_hanging_up_in_a_prefill_of_eight_chunks(tmp_path: Path, role: Any) -> None:
    """It costs at most the chunk that is under way."""
    async with local_worker(tmp_path, role=role, step_s=0.5, max_step_tokens=32) as w:
        request = w.generate(65, num_prompt=8 * 32)
        async with w.link.open(Prefill(request) if role == "prefill" else request):
            seen = await w.until(lambda report: report.prompt_tokens_computed > 0)
        after = await w.settled()
        assert after.prompt_tokens_computed <= seen.prompt_tokens_computed + 32


async def test_hanging_up_while_kv_is_held(tmp_path: Path) -> None:
    async with local_worker(tmp_path, "p", "prefill") as p:
        async with p.link.open(Prefill(p.generate(65))) as held:
            await prefilled_of(held)
            await p.until(lambda report: report.held == 1)
        await p.settled()


async def test_hanging_up_in_the_transfer(tmp_path: Path) -> None:
    """The network stands still: the collector closes its connection and leaves no file behind. The
    prefill worker holds on, and the KV can be collected after all."""
    async with (
        local_pair(tmp_path, kv_ways=()) as (p, d),
        tcp_proxy(p.peer.kv_address) as proxy,
    ):
        proxy.act, proxy.back = "hold", 600
        slow = msgspec.structs.replace(p.peer, kv_address=proxy.address)
        files = d.app.worker.kv_files
        request = p.generate(65, num_prompt=100, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            async with d.watching(slow), d.link.open(Resume(request, prefilled)):
                with anyio.fail_after(PATIENCE_S):
                    await proxy.stopped.wait()
                    while num_files(files) != 1:  # it has heard that bytes will come
                        await anyio.sleep(0.002)
            with anyio.fail_after(PATIENCE_S):
                await proxy.closed.wait()
            assert num_files(files) == 0
            await d.settled()
            assert p.report.held == 1
            async with d.watching(p.peer):
                assert ids(await d.ask(Resume(request, prefilled))) == [67, 68]


async def test_hanging_up_in_decode(tmp_path: Path) -> None:
    async with local_pair(tmp_path, step_s=0.02) as (p, d):
        request = p.generate(65, max_tokens=4000)
        async with p.link.open(Prefill(request)) as held:
            async with d.link.open(Resume(request, await prefilled_of(held))) as events:
                assert await anext(aiter(events)) == wire.Tokens((67,))
                assert num_files(d.app.worker.kv_files) == 0, "read already"
            await d.settled()


async def test_losing_the_front_is_hanging_up(tmp_path: Path) -> None:
    async with local_worker(tmp_path, step_s=0.02) as w:
        front: Any = type(w.link)(w.url, SECRET, WorkerEvent)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(front.run)
            await front.wait_connected()
            front.open_nowait(w.generate(65, max_tokens=5000), lambda event: None)
            await w.until(lambda report: report.in_flight == 1)
            tasks.cancel_scope.cancel()
        await w.settled()


@pytest.mark.slow
async def test_a_dying_engine_ends_every_request_and_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "FIRST_PAUSE_S", 2.0)  # so there is none when it is asked
    async with local_worker(tmp_path, step_s=0.02) as w:
        before = w.report
        answers: list[list[WorkerEvent]] = []

        async def ask(request: Any) -> None:
            answers.append(await w.ask(request))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, w.generate(65, max_tokens=5000))
            tasks.start_soon(ask, Prefill(w.generate(65)))
            await w.until(lambda report: report.held == 1)
            w.engine().kill()
        for events in answers:
            fault(events, Code.LOST)
        assert (await w.client.get("/ready")).status_code == 503
        refused = fault(await w.ask(w.generate(65)), Code.UNAVAILABLE)
        assert "not up" in refused
        after = await w.until(lambda report: report.ready)
        assert after.epoch != before.epoch
        assert ids(await w.ask(w.generate(65))) == [66, 67, 68, 69]
        assert "edgefire_engine_starts_total 2.0" in (await w.client.get("/metrics")).text


@pytest.mark.slow
async def test_a_ticket_of_an_earlier_life_is_refused(tmp_path: Path) -> None:
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            p.engine().kill()
            with anyio.fail_after(PATIENCE_S):
                assert [type(event) async for event in held] == [wire.Fault]
        fault(await d.ask(Resume(request, prefilled)), Code.LOST)
        await p.until(lambda report: report.ready)
