"""Where a front places requests: by caches and by load, and what is left when all is over."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest

from infire.prefix import chain_keys, root
from origin_gpu.handover import CacheNews, Prefill, Watch
from routing import wire
from routing.errors import Code
from tests.fakes.region import BLOCK_TOKENS, FakeRegion, Latch
from tests.origin_gpu.fronts import LOST, answer, code, finish, ids, request, split_region


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


def prompt_of(tenant: bytes) -> tuple[wire.Generate, list[bytes]]:
    """A prompt of five blocks and a bit, and what names them."""
    asked = request(token_ids=tuple(range(200, 222)), tenant_salt=tenant)
    return asked, chain_keys(root(tenant, "m", None), asked.token_ids, BLOCK_TOKENS)


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
