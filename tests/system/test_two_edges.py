"""Two edges of one fleet: each knows by itself which region is out, and counts its own requests."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx2
import pytest

from tests.system.faults import (
    PATIENCE_S,
    metric,
    nothing_in_flight,
    restart,
    second_edge,
    wait_metric,
)
from tests.system.procs import wait_ready
from tests.system.world import ACCOUNT, MODEL, NEAR_WEUR, Shape, World, front_words, world

pytestmark = [pytest.mark.system, pytest.mark.slow]
EDGES = ("edge", "edge-2")
OPEN = "edgefire_edge_region_breaker_open"


async def ask(w: World, edge: str) -> httpx2.Response:
    body = {"prompt": "A", "raw": True, "max_tokens": 3}
    url = f"{w.processes[edge].url}/client/v4/accounts/{ACCOUNT}/ai/run/{MODEL}"
    return await w.client.post(url, json=body, headers=w.headers(NEAR_WEUR))


async def ask_all(w: World, times: int, *edges: str) -> set[str]:
    """The regions that answered."""
    regions = set()
    for _ in range(times):
        for edge in edges:
            answer = await ask(w, edge)
            assert answer.status_code == 200, answer.text
            assert answer.json()["result"]["response"] == "BCD"
            regions.add(answer.headers["x-served-by"])
    return regions


async def until_served_by(w: World, region: str) -> None:
    """Both edges, whose every request is answered meanwhile."""
    with anyio.fail_after(PATIENCE_S):
        while await ask_all(w, 1, *EDGES) != {region}:
            await anyio.sleep(0.05)


async def num_ok(w: World, edge: str) -> float:
    return await metric(w, edge, "edgefire_edge_requests_total", outcome="ok")


async def test_each_has_its_breakers_and_counts_its_own(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(regions=("weur", "enam"))) as w:
        await second_edge(w)
        await until_served_by(w, "weur")
        before = {it: await num_ok(w, it) for it in EDGES}
        w.processes["weur-front"].kill()
        assert await ask_all(w, 10, *EDGES) == {"enam"}
        for edge in EDGES:
            assert await metric(w, edge, "edgefire_edge_region_connected", region="weur") == 0
            assert await metric(w, edge, "edgefire_edge_failed_tries_total") <= 5
            await wait_metric(
                w, edge, "edgefire_edge_requests_total", before[edge] + 10, outcome="ok"
            )
        await wait_ready(w, await restart(w, "weur-front", front_words(w, "weur")))
        await until_served_by(w, "weur")
        for edge in EDGES:
            assert await metric(w, edge, OPEN, region="weur") == 0
        before = {it: await num_ok(w, it) for it in EDGES}
        await ask_all(w, 4, "edge")
        await wait_metric(
            w, "edge", "edgefire_edge_requests_total", before["edge"] + 4, outcome="ok"
        )
        assert await num_ok(w, "edge-2") == before["edge-2"]
        w.processes["edge-2"].kill()
        assert await ask_all(w, 3, "edge") == {"weur"}
        for region in ("weur", "enam"):
            await w.settled(f"{region}-prefill", f"{region}-decode")
            await nothing_in_flight(w, region)
