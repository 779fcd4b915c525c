"""A front over fake workers that refuse, stop, die or are left: nothing is lost or told twice."""

from __future__ import annotations

from typing import Any

import anyio
import httpx2
import pytest

from origin_gpu.handover import Prefill, Resume
from origin_gpu.passage import _taker
from origin_gpu.place import Candidate
from routing import wire
from routing.errors import Code, Failure
from routing.secret import bearer
from tests.fakes.region import SECRET, Latch, failing
from tests.origin_gpu.fronts import LOST, answer, code, finish, ids, request, split_region

FULL = Failure(Code.NO_CAPACITY, "full", retry_after_s=3.0)


STOPPING = Failure(Code.DRAINING, "stopping", retry_after_s=1.0)


def decoder(name: str, layout: str = "l", tokens_in_flight: int = 0) -> Candidate:
    return Candidate(
        name=name,
        role="decode",
        models=(),
        layout_digest=layout,
        room=1,
        tokens_in_flight=tokens_in_flight,
    )


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
    async with split_region() as region, httpx2.AsyncClient() as client:
        region["p0"].gates["prefill"] = failing(FULL)
        assert await answer(region, request()) == [wire.Fault(Code.NO_CAPACITY, "full", 3.0)]
        assert "second_tries_total{" not in (await client.get(f"{region.url}/metrics")).text
        region["p0"].gates["prefill"] = failing(LOST)
        region["d0"].gates["token"] = failing(FULL)
        assert code(await answer(region, request())) is Code.NO_CAPACITY


async def test_when_the_only_prefill_worker_fails_a_decode_worker_does_it_all() -> None:
    async with split_region() as region:
        region["p0"].gates["prefill"] = failing(LOST)
        events = await answer(region, request())
        assert ids(events) == list(range(101, 111))
        assert isinstance(events[-1], wire.Finish)


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
