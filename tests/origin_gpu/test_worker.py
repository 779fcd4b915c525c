"""Workers asked as their front asks them: real sockets, real engine processes, tokens by hand."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from infire.notes import Gauges
from origin_gpu import kv_transfer, worker_app
from origin_gpu.handover import (
    CacheNews,
    Collected,
    Prefill,
    Prefilled,
    Resume,
    Watch,
    Watched,
    WorkerEvent,
)
from origin_gpu.kv_files import KVFiles
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_transfer import DoorTransport
from routing import wire
from routing.errors import Code
from routing.region import ProcessReport
from routing.wire import Logprob
from tests.fakes.faulty_way import Faulty, Take
from tests.fakes.model_folder import CONTEXT_WINDOW
from tests.fakes.tcp_proxy import tcp_proxy
from tests.origin_gpu.local_workers import (
    MODEL,
    PATIENCE_S,
    SECRET,
    LocalWorker,
    ids,
    local_pair,
    local_worker,
)


def usage(prompt: int, completion: int) -> wire.Usage:
    return wire.Usage(prompt_tokens=prompt, completion_tokens=completion)


def fault(events: list[WorkerEvent], code: Code) -> str:
    """The detail of the only terminal event, which must be a fault of this code."""
    terminal = [it for it in events if isinstance(it, wire.Finish | wire.Fault | Collected)]
    assert len(terminal) == 1
    assert isinstance(events[-1], wire.Fault)
    assert events[-1].code is code, events[-1]
    return events[-1].detail


def num_files(files: KVFiles) -> int:
    return sum(len(list(folder.glob("*.kv"))) for folder in files._folders)


def refusals(worker: LocalWorker) -> dict[tuple[str, str], int]:
    """KV that was refused there, by end and reason."""
    (counter,) = worker.app.worker.metrics._kv_refused.collect()
    return {
        (sample.labels["end"], sample.labels["reason"]): int(sample.value)
        for sample in counter.samples
        if sample.name.endswith("_total")
    }


async def prefilled_of(events: Any) -> Prefilled:
    with anyio.fail_after(PATIENCE_S):
        first = await anext(aiter(events))
    assert isinstance(first, Prefilled), first
    return first


async def test_a_whole_request(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, num_prompt=3, max_tokens=4))
        assert events[0] == wire.Started(0)
        assert ids(events) == [66, 67, 68, 69]
        assert events[-1] == wire.Finish("length", usage(3, 4))
        stopped = await w.ask(w.generate(65, max_tokens=9, sampling={"stop_ids": (68, 200)}))
        assert ids(stopped) == [66, 67, 68]
        assert stopped[-1] == wire.Finish("stop", usage(2, 3))


async def test_ids_made_elsewhere_count_as_completion(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, generated_ids=(66, 67), max_tokens=5))
        assert ids(events) == [68, 69, 70]
        assert events[-1] == wire.Finish("length", usage(2, 5))


async def test_logprobs_come_with_their_tokens(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, max_tokens=2, sampling={"logprobs": 2}))
        tokens = [it for it in events if isinstance(it, wire.Tokens)]
        got = [logprob for it in tokens for logprob in it.logprobs]
        assert got == [
            Logprob(66, 0.0, ((66, 0.0), (67, -1.0))),
            Logprob(67, 0.0, ((67, 0.0), (68, -1.0))),
        ]


async def test_prefill_hands_over_to_decode_which_computes_no_prompt_token(tmp_path: Path) -> None:
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, num_prompt=300, max_tokens=6)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            assert prefilled.first == wire.Tokens((66,))
            assert prefilled.finish is None
            ticket = prefilled.ticket
            assert ticket is not None
            assert (ticket.worker, ticket.url) == ("p", p.url)
            assert (ticket.num_tokens, ticket.num_bytes) == (300, 2400)  # 8 bytes a token
            assert ticket.epoch == p.report.epoch
            await p.until(lambda report: report.held == 1)
            events = await d.ask(Resume(request, prefilled))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        assert ids(events) == [67, 68, 69, 70, 71]
        assert events[-1] == wire.Finish("length", usage(300, 6))
        assert (await p.settled()).prompt_tokens_computed == 300
        assert (await d.settled()).prompt_tokens_computed == 0


async def test_a_worker_that_is_being_stopped_finishes_what_the_region_has_begun(
    tmp_path: Path,
) -> None:
    """It says so at once, takes nothing new, gives the KV that it has, and takes KV over."""
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, num_prompt=300, max_tokens=6)
        async with p.link.open(Prefill(request)) as held, p.link.open(Watch((p.peer, d.peer))) as w:
            prefilled = await prefilled_of(held)
            watch = aiter(w)
            with anyio.fail_after(PATIENCE_S):
                while not (await watched(watch)).report.ready:
                    pass
            for worker in (p, d):
                worker.app.worker.drain.begin(0.0)
            with anyio.fail_after(PATIENCE_S):
                while (await watched(watch)).report.ready:
                    pass
            assert (await p.client.get("/ready")).status_code == 503
            fault(await p.ask(Prefill(request)), Code.DRAINING)
            fault(await d.ask(request), Code.DRAINING)
            assert p.app.worker.drain.num_left() == 1
            events = await d.ask(Resume(request, prefilled))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        assert ids(events) == [67, 68, 69, 70, 71]
        assert p.app.worker.drain.num_left() == d.app.worker.drain.num_left() == 0
        for worker in (p, d):
            worker.app.worker.drain.begun = False  # for those who wait until it is as before


async def test_a_resumed_request_is_handed_over_too(tmp_path: Path) -> None:
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, generated_ids=(66, 67), max_tokens=5)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            assert prefilled.first == wire.Tokens((68,))
            events = await d.ask(Resume(request, prefilled))
        assert ids(events) == [69, 70], events
        assert events[-1] == wire.Finish("length", usage(2, 5))


@pytest.mark.parametrize(
    ("sampling", "reason"), [({"max_tokens": 1}, "length"), ({"stop_ids": (66,)}, "stop")]
)
async def test_a_request_that_ends_with_its_first_token_has_no_ticket(
    tmp_path: Path, sampling: dict[str, Any], reason: wire.Reason
) -> None:
    async with local_worker(tmp_path, role="prefill") as w:
        (prefilled,) = await w.ask(Prefill(w.generate(65, sampling=sampling)))
        assert prefilled == Prefilled(
            first=wire.Tokens((66,)), finish=wire.Finish(reason, usage(2, 1))
        )


async def test_a_prompt_with_room_for_one_token_gets_one(tmp_path: Path) -> None:
    """Whatever it asks for; one token longer, it is refused with the numbers."""
    async with local_worker(tmp_path, kv_tokens=64) as w:
        whole = await w.ask(w.generate(65, num_prompt=63, max_tokens=1000))
        assert ids(whole) == [66]
        assert whole[-1] == wire.Finish("length", usage(63, 1))
        (prefilled,) = await w.ask(Prefill(w.generate(65, num_prompt=63, max_tokens=1000)))
        assert isinstance(prefilled, Prefilled)
        found = msgspec.structs.replace(usage(63, 1), cached_tokens=48)  # in three full blocks
        assert prefilled.finish == wire.Finish("length", found)
        assert len(ids(await w.ask(w.generate(65, num_prompt=40, max_tokens=1000)))) == 24
        detail = fault(await w.ask(w.generate(65, num_prompt=64)), Code.BAD_INPUT)
        assert "64 tokens" in detail
        assert "64 that one request may have" in detail


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"model": "@cf/other"}, Code.UNAVAILABLE, "@cf/other"),
        ({"tokenizer_digest": "f" * 64}, Code.STALE_TOKENIZER, "ffffffffffff"),
        ({"token_ids": ()}, Code.BAD_INPUT, "prompt"),
        ({"token_ids": (1, 259)}, Code.BAD_INPUT, "259 is no token of a vocabulary of 259"),
        ({"token_ids": (-1,)}, Code.BAD_INPUT, "-1"),
        ({"generated_ids": (300,)}, Code.BAD_INPUT, "generated_ids: 300"),
        ({"sampling": {"logit_bias": ((999, 1.0),)}}, Code.BAD_INPUT, "logit_bias: 999"),
        ({"sampling": {"stop_ids": (1, 400)}}, Code.BAD_INPUT, "stop_ids: 400"),
        ({"max_tokens": 2, "generated_ids": (1, 2)}, Code.BAD_INPUT, "max_tokens: 2"),
        ({"adapter": "mine"}, Code.BAD_INPUT, "'mine'"),
        ({"grammar": wire.Grammar("regex", "a+")}, Code.BAD_INPUT, "regex"),
        ({"budget_s": 0.0}, Code.TIMEOUT, "0 s"),
    ],
)
async def test_what_cannot_run_is_refused_with_the_reason(
    worker: LocalWorker, change: dict[str, Any], code: Code, named: str
) -> None:
    request = worker.generate(**change)
    for asked in (request, Prefill(request)):
        events = await worker.ask(asked)
        assert named in fault(events, code)
        assert len(events) == 1
    assert ids(await worker.ask(worker.generate(65))) == [66, 67, 68, 69]


async def test_a_resume_needs_a_ticket(worker: LocalWorker) -> None:
    request = worker.generate()
    events = await worker.ask(Resume(request, Prefilled(first=wire.Tokens((66,)))))
    assert "ticket" in fault(events, Code.BAD_INPUT)


async def test_tickets_are_not_trusted(tmp_path: Path) -> None:
    """A worker that is not in the table, an address that is not the table's, KV of another shape:
    nothing is dialled, and the ticket can still be used as it was given."""
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            ticket = prefilled.ticket
            assert ticket is not None
            layout = msgspec.structs.replace(ticket.layout, model_digest="another")
            other_ids = msgspec.structs.replace(ticket.layout, tokenizer_digest="another")
            assert ticket.layout.tokenizer_digest == p.app.worker.assets_digest
            for change, code, named in (
                ({"worker": "mallory"}, Code.LOST, "mallory"),
                ({"url": "http://127.0.0.1:1"}, Code.INCOMPATIBLE, "http://127.0.0.1:1"),
                ({"layout": layout}, Code.INCOMPATIBLE, "model digest another"),
                ({"layout": other_ids}, Code.INCOMPATIBLE, "tokenizer digest another"),
                ({"num_tokens": 1}, Code.INCOMPATIBLE, "1 tokens"),
                ({"num_bytes": 1 << 40}, Code.INCOMPATIBLE, "bytes for 2 tokens, not 16"),
                ({"epoch": "before"}, Code.LOST, "before"),
                ({"request_id": "r2#9"}, Code.LOST, "r2#9"),
            ):
                forged = msgspec.structs.replace(
                    prefilled, ticket=msgspec.structs.replace(ticket, **change)
                )
                assert named in fault(await d.ask(Resume(request, forged)), code)
            assert p.report.held == 1
            assert ids(await d.ask(Resume(request, prefilled))) == [67, 68]
        assert refusals(d) == {("collector", Code.LOST): 1, ("collector", Code.INCOMPATIBLE): 5}
        assert refusals(p) == {("door", "epoch"): 1, ("door", "unknown"): 1}


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


async def test_a_collector_at_work_keeps_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes five times as long as the lease, and says that it lives."""
    monkeypatch.setattr(kv_transfer, "BUSY_EVERY_S", 0.05)
    async with local_pair(tmp_path, lease_s=0.3) as (p, d):

        async def slowly(take: Take, _: Path) -> None:
            await anyio.sleep(1.5)
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
    async with local_pair(tmp_path, lease_s=0.5) as (p, d):

        async def never(*_: object) -> None:
            await anyio.sleep_forever()

        d.app.decode._transport = DoorTransport(SECRET, ways=[Faulty(SharedFiles(), never)])
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            async with d.link.open(Resume(request, prefilled)):
                await anyio.sleep(1.0)
                assert p.report.held == 1  # it is still at it
            with anyio.fail_after(PATIENCE_S):
                detail = fault([event async for event in held], Code.LOST)
            assert detail.endswith("for 0.5 s")
        await p.settled()


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
    async with local_worker(tmp_path, role=role, step_s=0.2, max_step_tokens=32) as w:
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


async def test_a_dying_engine_ends_every_request_and_another_takes_over(tmp_path: Path) -> None:
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


async def test_watching(tmp_path: Path) -> None:
    """Said at once, and every second; what is said is what the report says."""
    async with local_worker(tmp_path, "p", "prefill") as p, p.link.open(Watch(())) as events:
        said = aiter(events)
        with anyio.fail_after(PATIENCE_S):
            first = await anext(said)
            assert isinstance(first, Watched)
            assert first.block_tokens == 16
            assert first.report == p.report
            assert first.kv_address == p.peer.kv_address
            assert first.layout_digest == p.app.worker.engine.layout_digest != ""
            assert first.report.models[0].model == MODEL
            assert first.report.models[0].context_window == CONTEXT_WINDOW
            assert await anext(said) == CacheNews(0)
            assert await anext(said) == first


async def test_changes_are_said_without_waiting_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_app, "TELL_EVERY_S", 1000.0)
    async with local_worker(tmp_path, "p", "prefill") as p, p.link.open(Watch(())) as events:
        said = aiter(events)
        with anyio.fail_after(PATIENCE_S):
            async with p.link.open(Prefill(p.generate(65))):
                while not (await watched(said)).report.held:
                    pass
            while (await watched(said)).report.held:
                pass


async def watched(said: AsyncIterator[WorkerEvent]) -> Watched:
    """How the worker is, as it says next."""
    while not isinstance(told := await anext(said), Watched):
        pass
    return told


async def test_what_it_tells_who_has_the_secret(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        report = msgspec.json.decode((await w.client.get("/v1/report")).content, type=ProcessReport)
        assert report == w.report
        assert (report.name, report.region, report.role) == ("w", "here", "both")
        assert report.url == w.url
        assert report.total_blocks == report.free_blocks == 1024
        digest = report.models[0].tokenizer_digest
        answer = await w.client.get(f"/v1/assets/{digest}")
        assets = msgspec.msgpack.decode(answer.content, type=wire.TextAssets)
        assert assets.digest == digest
        assert (await w.client.get(f"/v1/assets/{'0' * 64}")).status_code == 404
        metrics = (await w.client.get("/metrics")).text
        assert "edgefire_engine_up 1.0" in metrics
        assert "edgefire_engine_total_blocks 1024.0" in metrics


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
async def test_who_has_not_the_secret_gets_401(
    worker: LocalWorker, headers: dict[str, str]
) -> None:
    async with httpx2.AsyncClient(
        base_url=worker.url, headers=headers, timeout=PATIENCE_S, trust_env=False
    ) as stranger:
        for path in ("/v1/report", "/v1/assets/x"):
            assert (await stranger.get(path)).status_code == 401
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        assert (await stranger.get("/v1/link", headers=upgrade)).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert (await stranger.get(path)).status_code == 200


async def test_an_engine_that_says_nothing_is_not_ready(worker: LocalWorker) -> None:
    engine = worker.app.worker.engine
    heard_at, engine._heard_at = engine._heard_at, monotonic() - 5.1
    try:
        assert not worker.report.ready
    finally:
        engine._heard_at = heard_at


async def test_waiting_counts_what_the_gauge_has_not_seen_yet(worker: LocalWorker) -> None:
    it = worker.app.worker
    gauges = it.engine.gauges
    try:
        it.in_flight = it.settings.max_running + 3
        assert it.num_waiting == 3
        it.engine.gauges = Gauges(step=1, waiting=7)
        assert it.num_waiting == 7
    finally:
        it.in_flight, it.engine.gauges = 0, gauges


async def test_one_line_is_logged_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            await d.ask(Resume(request, await prefilled_of(held)))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        await d.ask(d.generate(model="@cf/other"))
    lines = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    told = [(it["role"], it["outcome"], it["output_tokens"], it["kv_bytes"]) for it in lines]
    assert sorted(told) == [
        ("both", "unavailable", 0, 0),
        ("decode", "length", 2, 16),
        ("prefill", "collected", 1, 0),
    ]
    assert {it["request_id"] for it in lines} == {"r1"}
