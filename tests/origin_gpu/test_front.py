"""A front between an edge's link and fake workers, over real sockets."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from infire.prefix import chain_keys, root
from origin_gpu.handover import CacheNews, Prefill, Resume, Watch
from origin_gpu.passage import _taker
from origin_gpu.place import Candidate
from routing import wire
from routing.errors import Code, Failure
from routing.region import RegionReport
from routing.secret import bearer
from tests.fakes.region import (
    ASSETS,
    BLOCK_TOKENS,
    MODEL,
    SECRET,
    FakeRegion,
    FakeWorker,
    Latch,
    failing,
    fake_region,
)

LOST = Failure(Code.LOST, "gone")
FULL = Failure(Code.NO_CAPACITY, "full", retry_after_s=3.0)


def request(first: int = 100, num_tokens: int = 10, **other: Any) -> wire.Generate:
    """The prompt is (first, first); the output first + 1, first + 2, ..."""
    sampling = wire.Sampling(max_tokens=num_tokens, seed=1, stop_ids=other.pop("stop_ids", ()))
    fields = {
        "request_id": f"r{first}",
        "tenant_salt": b"",
        "model": MODEL,
        "tokenizer_digest": ASSETS.digest,
        "token_ids": (first, first),
        "sampling": sampling,
        "budget_s": 20.0,
    }
    return wire.Generate(**(fields | other))


async def answer(region: FakeRegion, asked: wire.Generate) -> list[wire.Event]:
    with anyio.fail_after(30):
        async with region.edge.open(asked) as events:
            return [event async for event in events]


async def answer_within(
    patience_s: float, region: FakeRegion, asked: wire.Generate
) -> list[wire.Event]:
    """What came of the answer until the client hung up."""
    events: list[wire.Event] = []
    with anyio.move_on_after(patience_s):
        async with region.edge.open(asked) as stream:
            async for event in stream:
                events.append(event)  # noqa: PERF401  a comprehension would lose them all
    return events


def ids(events: list[wire.Event]) -> list[int]:
    return [i for event in events if isinstance(event, wire.Tokens) for i in event.ids]


def finish(num_tokens: int = 10, *, cached: int = 2, reason: wire.Reason = "length") -> wire.Finish:
    return wire.Finish(
        reason,
        wire.Usage(prompt_tokens=2, completion_tokens=num_tokens, cached_tokens=cached),
    )


def code(events: list[wire.Event]) -> Code:
    assert isinstance(events[-1], wire.Fault)
    return events[-1].code


@asynccontextmanager
async def split_region(
    num_prefill: int = 1, num_decode: int = 1
) -> AsyncGenerator[FakeRegion, None]:
    """Workers p0, p1, ... and d0, d1, ...; at its end nothing may be left of any request."""
    workers = [FakeWorker(f"p{n}", "prefill") for n in range(num_prefill)]
    workers += [FakeWorker(f"d{n}", "decode") for n in range(num_decode)]
    async with fake_region(*workers) as region:
        yield region
        await region.wait_idle()
        assert region.edge.num_open == 0


async def test_a_request_is_prefilled_handed_over_and_decoded() -> None:
    async with split_region() as region:
        events = await answer(region, request())
        assert events[:2] == [wire.Started(2), wire.Tokens((101,))]
        assert ids(events) == list(range(101, 111))
        assert events[-1] == finish()
        (prefill,), (resume,) = region["p0"].of(Prefill), region["d0"].of(Resume)
        assert prefill.request.token_ids == (100, 100)
        assert resume.prefilled.ticket.worker == "p0"
        assert 0 < prefill.request.budget_s <= 20


async def test_the_first_token_does_not_wait_for_the_decode_worker() -> None:
    async with split_region() as region:
        region["d0"].gates["collect"] = latch = Latch()
        async with region.edge.open(request()) as events:
            assert await anext(events) == wire.Started(2)  # type: ignore[call-overload]
            assert await anext(events) == wire.Tokens((101,))  # type: ignore[call-overload]
            await latch.wait_reached()
            latch.open()
            rest = [event async for event in events]
        assert rest[-1] == finish()


async def test_a_request_that_ends_with_its_first_token_is_not_handed_over() -> None:
    async with split_region() as region:
        assert (await answer(region, request(num_tokens=1)))[-1] == finish(1)
        stopped = await answer(region, request(stop_ids=(101,)))
        assert stopped[-1] == finish(1, reason="stop")
        assert region["d0"].of(Resume) == []


async def test_a_worker_of_both_roles_gets_the_request_itself() -> None:
    async with fake_region(FakeWorker("b", "both")) as region:
        events = await answer(region, request())
        assert events[0] == wire.Started(0)
        assert ids(events) == list(range(101, 111))
        assert events[-1] == finish(cached=0)
        assert len(region["b"].of(wire.Generate)) == 1


async def test_a_resumed_request_goes_on_where_it_was() -> None:
    async with split_region() as region:
        events = await answer(region, request(generated_ids=(101, 102, 103)))
        assert ids(events) == list(range(104, 111))
        assert events[-1] == finish(10)


async def test_a_prefill_worker_that_refuses_is_passed_over_for_another() -> None:
    async with split_region(num_prefill=2) as region:
        region["p0"].gates["prefill"] = failing(FULL)
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        assert len(region["p0"].of(Prefill)) == len(region["p1"].of(Prefill)) == 1


async def test_a_prefill_worker_that_dies_is_passed_over_for_another() -> None:
    async with split_region(num_prefill=2) as region:
        region["p0"].gates["prefill"] = latch = Latch()
        async with anyio.create_task_group() as tasks:
            events: list[wire.Event] = []

            async def ask() -> None:
                events.extend(await answer(region, request()))

            tasks.start_soon(ask)
            await latch.wait_reached()
            await region.kill("p0")
        assert ids(events) == list(range(101, 111))
        assert len(region["p1"].of(Prefill)) == 1


async def test_without_another_the_edge_is_told_what_the_first_said() -> None:
    async with split_region() as region:
        region["p0"].gates["prefill"] = failing(FULL)
        assert await answer(region, request()) == [wire.Fault(Code.NO_CAPACITY, "full", 3.0)]
        region["p0"].gates["prefill"] = failing(LOST)
        region["d0"].gates["token"] = failing(FULL)
        assert code(await answer(region, request())) is Code.NO_CAPACITY


async def test_when_the_only_prefill_worker_fails_a_decode_worker_does_it_all() -> None:
    async with split_region() as region:
        region["p0"].gates["prefill"] = failing(LOST)
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        assert isinstance(events[-1], wire.Finish)


STOPPING = Failure(Code.DRAINING, "stopping", retry_after_s=1.0)


async def test_a_worker_that_is_being_stopped_costs_no_second_try() -> None:
    async with split_region(num_prefill=3) as region, httpx2.AsyncClient() as client:
        region["p0"].gates["prefill"] = failing(STOPPING)
        region["p1"].gates["prefill"] = failing(LOST)
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        asked = [len(region[name].of(Prefill)) for name in ("p0", "p1", "p2")]
        assert asked == [1, 1, 1]
        metrics = (await client.get(f"{region.url}/metrics")).text
        assert 'second_tries_total{reason="lost"} 1.0' in metrics
        assert 'reason="draining"' not in metrics
        assert ids(await answer(region, request())) == list(range(101, 111))
        assert len(region["p0"].of(Prefill)) == 1  # it is not asked again


async def test_where_all_are_being_stopped_the_edge_is_told_so_at_once() -> None:
    async with split_region(num_prefill=2) as region:
        for name in ("p0", "p1"):
            region[name].gates["prefill"] = failing(STOPPING)
        region["d0"].gates["token"] = failing(STOPPING)
        assert (await answer(region, request()))[-1] == wire.Fault(Code.DRAINING, "stopping", 1.0)


async def test_a_decode_worker_that_is_stopped_during_a_prefill_is_passed_over() -> None:
    """The KV is not computed twice: the other collects it."""
    async with split_region(num_decode=2) as region, anyio.create_task_group() as tasks:
        region["p0"].gates["prefill"] = latch = Latch()
        events: list[wire.Event] = []

        async def ask() -> None:
            events.extend(await answer(region, request()))

        tasks.start_soon(ask)
        await latch.wait_reached()
        region["d0"].ready = False
        region["d0"].say()
        async with httpx2.AsyncClient(headers=bearer(SECRET)) as client:
            with anyio.fail_after(10):
                while 'role="decode",worker="d0"} 1.0' in (
                    await client.get(f"{region.url}/metrics")
                ).text.replace("worker_tokens", ""):
                    await anyio.sleep(0.01)
        latch.open()
    assert ids(events) == list(range(101, 111))
    assert len(region["p0"].of(Prefill)) == len(region["d1"].of(Resume)) == 1
    assert region["d0"].of(Resume) == region["d0"].of(wire.Generate) == []


def decoder(name: str, layout: str = "l", tokens_in_flight: int = 0) -> Candidate:
    return Candidate(
        name=name,
        role="decode",
        models=(),
        layout_digest=layout,
        room=1,
        tokens_in_flight=tokens_in_flight,
    )


@pytest.mark.parametrize(
    ("ready", "taker"),
    [
        ([decoder("d0", tokens_in_flight=9), decoder("d1")], "d0"),  # the one that was chosen
        ([decoder("d1", tokens_in_flight=2), decoder("d2", tokens_in_flight=1)], "d2"),
        ([decoder("d1", "another layout")], "d0"),
        ([], "d0"),
    ],
)
def test_kv_goes_to_who_was_chosen_unless_that_is_not_ready_and_another_is(
    ready: list[Candidate], taker: str
) -> None:
    assert _taker(ready, "l", "d0") == taker


async def test_what_the_request_itself_is_to_blame_for_is_not_tried_twice() -> None:
    async with split_region(num_prefill=2) as region:
        for name in ("p0", "p1"):
            region[name].gates["prefill"] = failing(Failure(Code.BAD_INPUT, "no such token"))
        assert await answer(region, request()) == [wire.Fault(Code.BAD_INPUT, "no such token")]
        assert len(region["p0"].of(Prefill)) + len(region["p1"].of(Prefill)) == 1


@pytest.mark.parametrize("why", [Code.INCOMPATIBLE, Code.LOST, Code.NO_CAPACITY])
async def test_when_the_kv_cannot_be_collected_another_worker_computes_it_anew(why: Code) -> None:
    async with split_region(num_decode=2) as region:
        region["d0"].gates["collect"] = failing(Failure(why, "cannot"))
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        assert events[-1] == finish()
        (anew,) = region["d1"].of(wire.Generate)
        assert anew.generated_ids == (101,)
        assert anew.request_id == "r100"


async def test_the_prefill_worker_itself_goes_on_if_there_is_no_other() -> None:
    async with split_region() as region:
        region["d0"].gates["collect"] = failing(LOST)
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        (anew,) = region["p0"].of(wire.Generate)
        assert anew.generated_ids == (101,)


async def test_a_decode_worker_that_dies_in_mid_stream_loses_and_doubles_no_token() -> None:
    async with split_region(num_decode=2) as region:
        sent = iter(range(5))

        async def die_after_five(_: wire.Generate) -> None:
            if next(sent, None) is None:
                await region.kill("d0")
                await anyio.sleep_forever()

        region["d0"].gates["token"] = die_after_five
        events = await answer(region, request(num_tokens=30))
        assert ids(events) == list(range(101, 131))
        assert events[-1] == finish(30)
        (anew,) = region["d1"].of(wire.Generate)
        assert anew.generated_ids == tuple(range(101, 107))


@pytest.mark.parametrize("stop_ids", [(), (104,)])
async def test_a_decode_worker_that_dies_between_last_token_and_finish_changes_nothing(
    stop_ids: tuple[int, ...],
) -> None:
    async with split_region(num_decode=2) as region:
        region["d0"].gates["finish"] = failing(LOST)
        events = await answer(region, request(num_tokens=4, stop_ids=stop_ids))
        assert ids(events) == [101, 102, 103, 104]
        assert events[-1] == finish(4, reason="stop" if stop_ids else "length")
        assert region["d1"].of(wire.Generate) == []


async def test_the_second_loss_is_the_edges_to_know() -> None:
    async with split_region(num_decode=3) as region:
        for name in ("d0", "d1", "d2"):
            region[name].gates["token"] = failing(LOST)
        events = await answer(region, request())
        assert code(events) is Code.LOST
        assert ids(events) == [101]  # the edge goes on elsewhere from here
        asked = [name for name in ("d0", "d1", "d2") if region[name].asked[1:]]
        assert len([n for n in asked if region[n].of(Resume) or region[n].of(wire.Generate)]) == 2


@pytest.mark.parametrize("stage", ["prefill", "collect", "token"])
async def test_when_the_time_is_up_the_work_ends(stage: Any) -> None:
    async with split_region() as region:
        region["p0" if stage == "prefill" else "d0"].gates[stage] = Latch()
        assert code(await answer(region, request(budget_s=0.3))) is Code.TIMEOUT


@pytest.mark.parametrize("stage", ["prefill", "collect", "token"])
async def test_hanging_up_ends_the_work_at_every_stage(stage: Any) -> None:
    async with split_region() as region:
        latch = Latch()
        region["p0" if stage == "prefill" else "d0"].gates[stage] = latch
        async with region.edge.open(request()):
            await latch.wait_reached()
        await region.wait_idle()


async def test_when_the_edge_is_lost_its_requests_end() -> None:
    async with split_region() as region:
        latch = Latch()
        region["d0"].gates["token"] = latch
        other: Any = type(region.edge)(region.url, SECRET, wire.Event)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other.run)
            await other.wait_connected()
            other.open_nowait(request(), lambda event: None)
            await latch.wait_reached()
            tasks.cancel_scope.cancel()
        await region.wait_idle()


async def test_requests_that_cannot_be_placed_are_refused_with_the_reason() -> None:
    async with split_region() as region:
        assert code(await answer(region, request(model="@cf/other"))) is Code.UNAVAILABLE
        assert code(await answer(region, request(tokenizer_digest="old"))) is Code.STALE_TOKENIZER
        region["d0"].waiting = region["d0"].max_waiting
        region["d0"].say()
        with anyio.fail_after(10):
            while (refusal := (await answer(region, request()))[-1]) == finish():
                await anyio.sleep(0.01)
        assert isinstance(refusal, wire.Fault)
        assert refusal.code is Code.NO_CAPACITY
        assert refusal.retry_after_s


def prompt_of(tenant: bytes) -> tuple[wire.Generate, list[bytes]]:
    """A prompt of five blocks and a bit, and what names them."""
    asked = request(token_ids=tuple(range(200, 222)), tenant_salt=tenant)
    return asked, chain_keys(root(tenant, "m", None), asked.token_ids, BLOCK_TOKENS)


async def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    asked, keys = prompt_of(b"tenant")
    async with split_region(num_prefill=3) as region:
        region["p1"].tell(CacheNews(0, tuple(keys[:2])))
        region["p2"].tell(CacheNews(0, tuple(keys[:4])))
        await region.wait_known("p2", 4)
        await answer(region, asked)
        assert len(region["p2"].of(Prefill)) == 1
        await answer(region, prompt_of(b"another")[0])  # the same ids, for whom nothing is cached
        assert len(region["p0"].of(Prefill)) == 1
        region["p2"].tell(CacheNews(1, (), tuple(keys[:3])))
        await region.wait_known("p2", 1)
        await answer(region, asked)
        assert len(region["p1"].of(Prefill)) == 1


async def test_news_of_a_cache_that_were_lost_are_asked_for_anew() -> None:
    """Case 21: a gap is noticed, and costs a watch; until then the prompt goes anywhere."""
    asked, keys = prompt_of(b"tenant")
    async with split_region(num_prefill=2) as region:
        region["p1"].tell(CacheNews(0, tuple(keys[:1])))
        await region.wait_known("p1", 1)
        before = len(region["p1"].of(Watch))
        region["p1"].tell(CacheNews(2, tuple(keys[2:])))
        await region.wait_known("p1", 0)
        with anyio.fail_after(10):
            while len(region["p1"].of(Watch)) == before:
                await anyio.sleep(0.005)
        assert ids(await answer(region, asked)) == list(range(222, 232))
        region["p1"].tell(CacheNews(0, tuple(keys)))
        await region.wait_known("p1", 5)
        await answer(region, asked)
        assert len(region["p1"].of(Prefill)) == 1


async def test_a_worker_that_is_gone_has_nothing_cached() -> None:
    async with split_region(num_prefill=2) as region:
        region["p1"].tell(CacheNews(0, (b"k" * 16,)))
        await region.wait_known("p1", 1)
        await region.kill("p1")
        await region.wait_known("p1", 0)


async def test_load_is_spread_by_tokens_in_flight() -> None:
    async with split_region(num_prefill=2, num_decode=2) as region:
        latches = {name: Latch() for name in ("p0", "p1")}
        for name, latch in latches.items():
            region[name].gates["prefill"] = latch
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer, region, request(100, token_ids=(100,) * 50))
            await latches["p0"].wait_reached()
            for first in (200, 300, 400):
                tasks.start_soon(answer, region, request(first))
            await latches["p1"].wait_reached()
            with anyio.fail_after(10):
                while region["p1"].num_open < 3:
                    await anyio.sleep(0.005)
            assert region["p0"].num_open == 1
            for latch in latches.values():
                latch.open()


@pytest.mark.parametrize("num_streams", [200, 1000])
async def test_many_requests_at_once_each_get_their_own_tokens(num_streams: int) -> None:
    async with split_region(2, 2) as region:
        for worker in region.workers.values():
            worker.max_waiting = num_streams
        answers: dict[int, list[wire.Event]] = {}

        async def ask(first: int) -> None:
            answers[first] = await answer(region, request(first, num_tokens=20))

        async with anyio.create_task_group() as tasks:
            for number in range(num_streams):
                tasks.start_soon(ask, 100 * number)
        for first, events in answers.items():
            assert ids(events) == list(range(first + 1, first + 21))
            assert events[-1] == finish(20)
        assert len(answers) == num_streams


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_left_whatever_is_asked_hung_up_and_lost(seed: int) -> None:
    rng = random.Random(seed)
    async with split_region(2, 3) as region:

        async def sometimes(_: Any) -> None:
            await anyio.sleep(rng.choice([0, 0, 0.001]))
            if rng.random() < 0.02:
                raise LOST

        for worker in region.workers.values():
            worker.gates = dict.fromkeys(("prefill", "collect", "token", "finish"), sometimes)

        async def ask(first: int) -> None:
            asked = request(first, num_tokens=rng.randrange(1, 40))
            patience_s = rng.choice([0.0, 0.01, 0.05, 30.0])
            events = await answer_within(patience_s, region, asked)
            got = ids(events)
            assert got == list(range(first + 1, first + 1 + len(got)))
            if events and isinstance(events[-1], wire.Finish):
                assert len(got) == asked.sampling.max_tokens
            elif patience_s == 30.0:
                assert code(events) is Code.LOST

        async with anyio.create_task_group() as tasks:
            for number in range(150):
                tasks.start_soon(ask, 100 * number)
                await anyio.sleep(rng.choice([0, 0.002]))


async def test_each_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with split_region() as region:
        await answer(region, request())
        await region.wait_idle()
    (line,) = [r for r in caplog.records if r.name == "origin_gpu.front"]
    fields = line.fields  # type: ignore[attr-defined]
    assert fields.pop("ttft_ms") <= fields.pop("total_ms")
    assert fields == {
        "request_id": "r100",
        "model": MODEL,
        "prefill_worker": "p0",
        "decode_worker": "d0",
        "prompt_tokens": 2,
        "output_tokens": 10,
        "outcome": "length",
    }


async def test_a_region_reports_itself_and_its_workers_to_those_with_the_secret() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        assert (await client.get(f"{region.url}/v1/report")).status_code == 401
        response = await client.get(f"{region.url}/v1/report", headers=bearer(SECRET))
        report = msgspec.json.decode(response.content, type=RegionReport)
        assert (report.region, report.room) == ("here", 100)
        assert [(it.name, it.role) for it in report.processes] == [
            ("here-front", "front"),
            ("p0", "prefill"),
            ("d0", "decode"),
        ]
        assert [it.model for it in report.models] == [MODEL]


async def test_a_front_is_ready_when_a_request_could_go_all_the_way() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        assert (await client.get(f"{region.url}/health")).status_code == 200
        assert (await client.get(f"{region.url}/ready")).status_code == 200
        await region.kill("d0")  # one alone does both
        with anyio.fail_after(10):
            while 'role="decode",worker="d0"} 0.0' not in await metrics(client, region):
                await anyio.sleep(0.01)
        assert (await client.get(f"{region.url}/ready")).status_code == 200
        await region.kill("p0")
        with anyio.fail_after(10):
            while (await client.get(f"{region.url}/ready")).status_code != 503:
                await anyio.sleep(0.01)
        assert (await client.get(f"{region.url}/health")).status_code == 200


async def metrics(client: httpx2.AsyncClient, region: FakeRegion) -> str:
    return (await client.get(f"{region.url}/metrics")).text


async def test_workers_come_and_go_while_requests_are_answered() -> None:
    async with split_region(num_prefill=2) as region:
        client = httpx2.AsyncClient(base_url=region.url, headers=bearer(SECRET), trust_env=False)
        async with client, anyio.create_task_group() as tasks:
            rows = (await client.get("/v1/workers")).json()
            assert {row["name"] for row in rows} == {"p0", "p1", "d0"}
            region["p0"].gates["prefill"] = latch = Latch()
            events: list[wire.Event] = []

            async def ask() -> None:
                events.extend(await answer(region, request()))

            tasks.start_soon(ask)
            await latch.wait_reached()
            left = [row for row in rows if row["name"] != "p0"]
            assert (await client.put("/v1/workers", json=left)).json() == left
            assert ids(await answer(region, request(200))) == list(range(201, 211))
            assert len(region["p1"].of(Prefill)) == 1  # p0 gets nothing new
            elsewhere = {"name": "p0", "role": "prefill", "url": "http://127.0.0.1:1"}
            refused = await client.put("/v1/workers", json=[*left, elsewhere])
            assert refused.status_code == 409
            latch.open()
            with anyio.fail_after(10):
                while 'worker="p0"' in await metrics(client, region):
                    await anyio.sleep(0.01)
            assert ids(events) == list(range(101, 111))
            region["p0"].gates.clear()
            assert (await client.put("/v1/workers", json=rows)).status_code == 200
            await region.wait_known("p0", 0)
            with anyio.fail_after(10):
                while len(region["p0"].of(Prefill)) < 2:  # it is asked again, once it has said so
                    assert ids(await answer(region, request(300))) == list(range(301, 311))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "Expected `array`"),
        (b"[]", "needs a worker"),
        (b'[{"name":"p0","role":"edge","url":"http://a:1"}]', r"Invalid enum value 'edge'"),
        (b'[{"name":"p0","role":"both","url":"ftp://a"}]', "NAME=ROLE@URL"),
        (b'[{"name":"p0","role":"both"}]', "missing required field `url`"),
    ],
)
async def test_a_list_of_workers_with_a_mistake_is_refused(body: bytes, says: str) -> None:
    async with split_region() as region, httpx2.AsyncClient(headers=bearer(SECRET)) as client:
        refused = await client.put(f"{region.url}/v1/workers", content=body)
        assert refused.status_code == 400
        assert says in refused.text
        assert ids(await answer(region, request())) == list(range(101, 111))


async def test_metrics_count_requests_tokens_and_frames() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        await answer(region, request())
        await answer(region, request(model="@cf/made-up-by-somebody"))
        await region.wait_idle()
        lines = (await client.get(f"{region.url}/metrics")).text.splitlines()
        assert f'edgefire_front_requests_total{{model="{MODEL}",outcome="length"}} 1.0' in lines
        assert 'edgefire_front_requests_total{model="unknown",outcome="unavailable"} 1.0' in lines
        assert f'edgefire_front_tokens_total{{kind="output",model="{MODEL}"}} 10.0' in lines
        assert f'edgefire_front_ttft_seconds_count{{model="{MODEL}"}} 1.0' in lines
        assert 'edgefire_front_worker_up{role="prefill",worker="p0"} 1.0' in lines
        assert any(line.startswith("edgefire_front_link_frames_total{") for line in lines)


async def test_text_assets_come_from_a_worker_once_and_only_if_they_are_what_was_asked_for() -> (
    None
):
    async with split_region() as region, httpx2.AsyncClient() as client:
        url = f"{region.url}/v1/assets/{ASSETS.digest}"
        assert (await client.get(url)).status_code == 401
        for _ in range(3):
            response = await client.get(url, headers=bearer(SECRET))
            assert msgspec.msgpack.decode(response.content, type=wire.TextAssets) == ASSETS
        assert region["p0"].fetched + region["d0"].fetched == 1

        for worker in region.workers.values():  # they claim another, and send what they have
            worker.tokenizer_digest = "claimed"
            worker.say()
        with anyio.fail_after(10):
            while not isinstance((await answer(region, request()))[-1], wire.Fault):
                await anyio.sleep(0.01)
        response = await client.get(f"{region.url}/v1/assets/claimed", headers=bearer(SECRET))
        assert response.status_code == 404
        assert region["p0"].fetched + region["d0"].fetched == 3
