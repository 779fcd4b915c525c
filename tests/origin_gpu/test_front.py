"""A front over fake workers: how a request goes through its region."""

from __future__ import annotations

from origin_gpu.handover import Prefill, Resume
from routing import wire
from tests.fakes.region import FakeWorker, Latch, fake_region
from tests.origin_gpu.fronts import answer, finish, ids, request, split_region


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


async def test_a_prefill_worker_hears_that_its_kv_is_gone_before_the_front_hangs_up() -> None:
    """However late it hears of it: what the client got to its end was not given up."""
    late = Latch()

    async def gate(asked: wire.Generate) -> None:
        if asked.request_id == "late":
            await late(asked)

    async with split_region() as region:
        region["p0"].gates["held"] = gate
        assert (await answer(region, request(request_id="late")))[-1] == finish()
        # The front would have hung up before it asked for this, over the same connection.
        assert (await answer(region, request(200)))[-1] == finish()
        assert region["p0"].open["Prefill"] == 1
        late.open()


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
