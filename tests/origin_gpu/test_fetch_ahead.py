"""KV of a long prompt that is collected while the rest of it is computed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import anyio
import msgspec
import pytest

from origin_gpu.handover import Collected, Computing, Fetch, Prefill, Prefilled, Resume
from origin_gpu.settings import KVWay
from routing.errors import Code
from tests.origin_gpu.local_workers import PATIENCE_S, LocalWorker, fault, ids, local_pair

Pair: TypeAlias = tuple[LocalWorker, LocalWorker]


@asynccontextmanager
async def slow_pair(folder: Path, ways: tuple[KVWay, ...]) -> AsyncGenerator[Pair, None]:
    """Steps take 50 ms, of 64 tokens: a prompt of 1,000 is computed in 16."""
    flags = {"step_s": 0.05, "max_step_tokens": 64, "kv_ways": ways}
    async with local_pair(folder, **flags) as pair:
        yield pair


@pytest.mark.parametrize("ways", [(), ("shared",)], ids=["tcp", "shared"])
async def test_kv_of_a_long_prompt_is_collected_as_it_is_computed(
    tmp_path: Path, ways: tuple[KVWay, ...]
) -> None:
    async with slow_pair(tmp_path, ways) as (p, d):
        request = p.generate(65, num_prompt=1000, max_tokens=6)
        async with p.link.open(Prefill(request)) as held:
            events = aiter(held)
            computing = await anext(events)
            assert isinstance(computing, Computing)
            assert computing.ticket.num_ready == 256
            async with d.link.open(Fetch(computing.ticket)):
                prefilled = await anext(events)
                assert isinstance(prefilled, Prefilled)
                assert prefilled.piece_ends == (256, 512, 768, 1000)
                assert await anext(events) == Collected()  # nobody has asked for the rest
                answer = await d.ask(Resume(request, prefilled))
        assert ids(answer) == [67, 68, 69, 70, 71]
        assert (await p.settled()).prompt_tokens_computed == 1000
        assert (await d.settled()).prompt_tokens_computed == 0
        await nothing_left(p, d)


async def test_a_prompt_that_ends_at_its_first_token_was_fetched_in_vain(tmp_path: Path) -> None:
    async with slow_pair(tmp_path, ()) as (p, d):
        request = p.generate(65, num_prompt=1000, sampling={"stop_ids": (66,)})
        async with p.link.open(Prefill(request)) as held:
            events = aiter(held)
            computing = await anext(events)
            assert isinstance(computing, Computing)
            async with d.link.open(Fetch(computing.ticket)):
                prefilled = await anext(events)
        assert isinstance(prefilled, Prefilled)
        assert prefilled.ticket is None
        await p.settled()
        await d.settled()
        await nothing_left(p, d)


async def test_what_could_not_be_fetched_ahead_is_collected_when_it_is_needed(
    tmp_path: Path,
) -> None:
    async with slow_pair(tmp_path, ()) as (p, d):
        request = p.generate(65, num_prompt=1000, max_tokens=6)
        async with p.link.open(Prefill(request)) as held:
            events = aiter(held)
            computing = await anext(events)
            assert isinstance(computing, Computing)
            wrong = msgspec.structs.replace(computing.ticket, epoch="another")
            fault(await d.ask(Fetch(wrong)), Code.LOST)
            async with d.link.open(Fetch(computing.ticket)):
                await anyio.sleep(0.02)  # and this one is given up in the middle
            prefilled = await anext(events)
            assert isinstance(prefilled, Prefilled)
            answer = await d.ask(Resume(request, prefilled))
        assert ids(answer) == [67, 68, 69, 70, 71]
        await p.settled()
        await d.settled()


async def test_a_request_that_is_fetched_ahead_and_given_up_leaves_nothing(tmp_path: Path) -> None:
    async with slow_pair(tmp_path, ()) as (p, d):
        request = p.generate(65, num_prompt=1000, max_tokens=6)
        async with p.link.open(Prefill(request)) as held:
            computing = await anext(aiter(held))
            assert isinstance(computing, Computing)
            async with d.link.open(Fetch(computing.ticket)):
                await anyio.sleep(0.1)
        await p.settled()
        await d.settled()
        await nothing_left(p, d)


async def nothing_left(*workers: LocalWorker) -> None:
    """Files go a moment after the stream that had them."""
    with anyio.fail_after(PATIENCE_S):
        while [path for worker in workers for path in kv_left(worker)]:
            await anyio.sleep(0.01)


def kv_left(worker: LocalWorker) -> Iterator[Path]:
    """Files of KV that a worker has."""
    for folder in worker.app.worker.kv_files._folders:
        yield from folder.glob("*.kv")
