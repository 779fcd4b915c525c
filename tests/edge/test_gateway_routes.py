"""Every route that runs a model passes the gateway: cached, asked once, logged, counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from tests.fakes.counting_region import MODEL, CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over

VECTORS = "@cf/test/vectors"
TURNS = [{"role": "user", "content": "hello"}]
ROUTES: Mapping[str, dict[str, Any]] = {
    f"/run/{MODEL}": {"messages": TURNS, "max_tokens": 3},
    "/run": {"model": MODEL, "input": {"messages": TURNS, "max_tokens": 3}},
    "/v1/chat/completions": {"model": MODEL, "messages": TURNS, "max_tokens": 3},
    "/v1/completions": {"model": MODEL, "prompt": "A", "max_tokens": 3},
    "/v1/responses": {"model": MODEL, "input": "hello", "max_output_tokens": 3},
    "/v1/messages": {"model": MODEL, "messages": TURNS, "max_tokens": 3},
    "/v1/embeddings": {"model": VECTORS, "input": "hello"},
    f"/run/{VECTORS}": {"text": "hello"},
}
STREAMED = [path for path in ROUTES if "embeddings" not in path and VECTORS not in path]


@pytest.fixture
async def regions() -> AsyncGenerator[list[CountingRegion], None]:
    made = [CountingRegion(), CountingRegion("enam", model=VECTORS, task="text-embeddings")]
    async with running(*made):
        yield made


@pytest.fixture
async def edge(tmp_path: Path, regions: list[CountingRegion]) -> AsyncGenerator[EdgeClient, None]:
    asked = [it.region for it in regions]
    async with edge_over(tmp_path, asked, store=tmp_path / "store.sqlite") as client:
        yield client


async def ask(edge: EdgeClient, path: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await edge.http.post(edge.ai + path, json=body, headers={**edge.headers(), **named})


def num_asked(regions: list[CountingRegion]) -> int:
    return sum(len(it.asked) + len(it.embeds) for it in regions)


@pytest.mark.parametrize("path", ROUTES)
async def test_the_cache(edge: EdgeClient, regions: list[CountingRegion], path: str) -> None:
    first = await ask(edge, path, ROUTES[path], cf_aig_cache_ttl="60")
    again = await ask(edge, path, ROUTES[path], cf_aig_cache_ttl="60")
    statuses = [it.headers["cf-aig-cache-status"] for it in (first, again)]
    assert (statuses, first.content) == (["MISS", "HIT"], again.content)
    assert num_asked(regions) == 1
    await edge.wait_metric("edgefire_edge_cached_total", 1)


@pytest.mark.parametrize("path", STREAMED)
async def test_a_stream_with_a_key(
    edge: EdgeClient, regions: list[CountingRegion], path: str
) -> None:
    body = ROUTES[path]
    inner = {**body["input"], "stream": True} if path == "/run" else None
    body = {**body, "input": inner} if inner else {**body, "stream": True}
    first = await ask(edge, path, body, idempotency_key="k")
    again = await ask(edge, path, body, idempotency_key="k")
    assert first.headers["content-type"].startswith("text/event-stream")
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert first.content == again.content
    assert num_asked(regions) == 1


@pytest.mark.parametrize("path", ROUTES)
async def test_a_row_in_the_logs(edge: EdgeClient, path: str) -> None:
    answer = await ask(edge, path, ROUTES[path], cf_aig_metadata='{"who": "me"}')
    assert answer.status_code == 200
    with anyio.fail_after(10):
        while True:
            found = await edge.http.get(f"{edge.ai}/logs", headers=edge.headers())
            if rows := found.json()["result"]:
                break
            await anyio.sleep(0.05)
    [row] = rows
    assert row["metadata"] == {"who": "me"}
    assert row["id"] == answer.headers["x-request-id"]


async def test_a_response_that_is_told_again_is_the_one_that_is_stored(edge: EdgeClient) -> None:
    path = "/v1/responses"
    told = [
        (await ask(edge, path, ROUTES[path], cf_aig_cache_ttl="60")).json()["id"] for _ in range(2)
    ]
    assert told[0] == told[1]
    more = {**ROUTES[path], "previous_response_id": told[1]}
    assert (await ask(edge, path, more)).status_code == 200


async def test_the_store_is_counted(edge: EdgeClient) -> None:
    await ask(edge, "/v1/completions", ROUTES["/v1/completions"], idempotency_key="k")
    assert await edge.metric("edgefire_edge_store_calls_total", outcome="ok") > 0
    assert await edge.metric("edgefire_edge_store_busy_seconds_total") > 0
    await ask(edge, "/v1/completions", {**ROUTES["/v1/completions"], "n": 2}, idempotency_key="k")
    assert await edge.metric("edgefire_edge_store_calls_total", outcome="refused") == 1
