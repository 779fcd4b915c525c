"""Whole answers become small where that is wanted; streams stay streams."""

from __future__ import annotations

import gzip
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import msgspec
import pytest

from edge.compress import LEAST_BYTES, _takes_gzip
from tests.fakes.counting_region import CountingRegion, Steps, running
from tests.fakes.edge_client import EdgeClient, edge_over


@pytest.fixture
def region() -> CountingRegion:
    return CountingRegion()


@pytest.fixture
async def edge(tmp_path: Path, region: CountingRegion) -> AsyncGenerator[EdgeClient, None]:
    async with running(region), edge_over(tmp_path, [region.region]) as client:
        yield client


async def bytes_of(
    edge: EdgeClient, accept: str | None, max_tokens: int
) -> tuple[dict[str, str], bytes]:
    """Headers, and the body as it crosses the wire."""
    body = {"prompt": "A", "raw": True, "max_tokens": max_tokens}
    headers = edge.headers() | {"accept-encoding": accept or "identity"}
    async with edge.http.stream("POST", edge.run_url, json=body, headers=headers) as answer:
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])
    return dict(answer.headers), raw


async def test_a_long_answer_is_the_same_in_fewer_bytes(edge: EdgeClient) -> None:
    plain_headers, plain = await bytes_of(edge, None, 2000)
    headers, small = await bytes_of(edge, "br, gzip, deflate", 2000)
    assert headers["content-encoding"] == "gzip"
    assert int(headers["content-length"]) == len(small) < len(plain)
    assert headers["content-type"] == "application/json"
    assert msgspec.json.decode(gzip.decompress(small)) == msgspec.json.decode(plain)
    assert "content-encoding" not in plain_headers
    assert headers["vary"] == plain_headers["vary"] == "accept-encoding"


async def test_a_short_answer_stays_as_it_is(edge: EdgeClient) -> None:
    headers, plain = await bytes_of(edge, "gzip", 3)
    assert "content-encoding" not in headers
    assert len(plain) < LEAST_BYTES
    assert "vary" not in headers


async def test_a_stream_is_not_held_back(edge: EdgeClient, region: CountingRegion) -> None:
    """Each event is there before the next is made."""
    steps = region.gate = Steps()
    body = {"prompt": "A", "raw": True, "max_tokens": 300, "stream": True}
    headers = edge.headers() | {"accept-encoding": "gzip"}
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_allow_later, steps, 1)
            async with edge.http.stream("POST", edge.run_url, json=body, headers=headers) as got:
                assert "content-encoding" not in got.headers
                lines = got.aiter_lines()
                assert '"B"' in await anext(lines)
                steps.allow(2)
                await anext(lines)
                assert '"C"' in await anext(lines)
                steps.allow(300)
                left = [line async for line in lines]
    assert left[-2:] == ["data: [DONE]", ""]


async def _allow_later(steps: Steps, upto: int) -> None:
    await anyio.sleep(0.05)
    steps.allow(upto)


@pytest.mark.parametrize(
    ("accepted", "taken"),
    [
        ("gzip", True),
        ("x-gzip", True),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", True),
        ("deflate, GZIP", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("br", False),
        ("notgzip", False),
        ("gzipped", False),
        ("gzip;q=1.2.3", False),
        ("", False),
    ],
)
def test_who_takes_gzip(accepted: str, taken: bool) -> None:
    assert _takes_gzip(accepted) is taken
