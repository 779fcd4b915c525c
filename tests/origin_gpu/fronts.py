"""Regions of fake workers, and requests to their fronts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2

from routing import wire
from routing.errors import Code, Failure
from tests.fakes.region import ASSETS, MODEL, FakeRegion, FakeWorker, fake_region

LOST = Failure(Code.LOST, "gone")


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


async def metrics(client: httpx2.AsyncClient, region: FakeRegion) -> str:
    return (await client.get(f"{region.url}/metrics")).text
