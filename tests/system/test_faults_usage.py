"""Usage is counted exactly once, whatever becomes of clients, regions and the edge itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from anyio import to_thread

from routing.usage import LedgerRow
from tests.fakes.events import frames
from tests.routing.test_rows import ledger_rows
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    metric,
    nothing_in_flight,
    restart,
    wait_metric,
    world_over,
)
from tests.system.procs import wait_ready
from tests.system.world import (
    ACCOUNT,
    MODEL,
    NEAR_WEUR,
    ROOT,
    Shape,
    World,
    counted,
    edge_key,
    edge_words,
    front_words,
    world,
)

pytestmark = pytest.mark.system
BOTH = ("weur", "enam")
OTHER = "globex"
BLOCKS = "A" * 100  # 6 full blocks of 16, which a cache knows again
LONG = 2000  # tokens: no answer that ends by itself
ROOMY = ("--kv-tokens", "65536")


@pytest.mark.slow
async def test_what_one_tenant_has_said_is_in_no_others_cache(tmp_path: Path) -> None:
    """Case 25: the same prompt of two tenants, in turn: each finds what it has said itself and
    nothing else, whatever salt a body or a header claims; and so it is in the ledger."""
    async with world(tmp_path) as w:
        keys = {ACCOUNT: w.key, OTHER: edge_key(w.home, "create", "--account", OTHER)}
        salts = [{}, {"cache_salt": "x"}, {"tenant_salt": "eA==", "salt": "x", "user": "x"}]
        cached: dict[str, list[int]] = {ACCOUNT: [], OTHER: []}
        for account in (ACCOUNT, OTHER):
            for claims in salts:
                cached[account].append(await cached_tokens(w, account, keys[account], claims))
        cached[ACCOUNT].append(await chat_cached_tokens(w, {"cache_salt": OTHER}))
        cached[ACCOUNT].append(await chat_cached_tokens(w, {"cache_salt": ACCOUNT}))
        assert cached == {ACCOUNT: [0, 96, 96, 0, 96], OTHER: [0, 96, 96]}
        await nothing_in_flight(w)
        for account, told in cached.items():
            rows = [row for row in await ledger(w, 8) if row.account == account]
            assert [row.cached_tokens for row in rows] == told
            assert len({row.tenant for row in rows}) == 1
        assert await reconciled(w) == []


async def cached_tokens(w: World, account: str, key: str, claims: dict[str, str]) -> int:
    body = {"prompt": f"{BLOCKS}!", "raw": True, "max_tokens": 3, **claims}
    headers = {"authorization": f"Bearer {key}", "x-cache-salt": "x", **NEAR_WEUR}
    answer = await w.client.post(w.run_url(account=account), json=body, headers=headers)
    usage = answer.json()["result"]["usage"]
    return int(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))


async def chat_cached_tokens(w: World, claims: dict[str, str]) -> int:
    messages = [{"role": "user", "content": BLOCKS}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 3, **claims}
    answer = await w.client.post(w.v1_url(), json=body, headers=w.headers())
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.slow
async def test_usage_over_disconnects_and_failover(tmp_path: Path) -> None:
    """Case 25: clients that stay, that leave, that are cut by a stop string or refused, while the
    link to their region is lost and then its workers are killed: a row each, as they were told,
    and the journals agree to the token."""
    shape = Shape(regions=BOTH, step_s=0.02, worker_flags=ROOMY)
    async with world_over(tmp_path, shape) as (w, net):
        crowd = Crowd(w)
        for disturb in (net.cut, lambda: kill_workers(w), lambda: None):
            async with anyio.create_task_group() as tasks:
                crowd.start(tasks)
                await crowd.heard[-1].until(5)
                disturb()
        await nothing_in_flight(w)
        await nothing_in_flight(w, "enam")
        rows = {row.request_id: row for row in await ledger(w, crowd.num_asked)}
        assert len(rows) == crowd.num_asked
        assert await metric(w, "edge", "edgefire_edge_requests_total") == crowd.num_asked
        for request_id, used in crowd.told.items():
            row = rows.pop(request_id)
            told = (used["prompt_tokens"], used["completion_tokens"])
            assert (row.prompt_tokens, row.completion_tokens) == told
            assert (row.outcome, row.source) == ("ok", "edge")
        for request_id, num_heard in crowd.left.items():
            row = rows.pop(request_id)
            assert row.outcome == "hung_up"
            assert num_heard <= row.completion_tokens < LONG
        assert not rows
        resumed = [row for row in await ledger(w, crowd.num_asked) if row.regions == "weur,enam"]
        assert len(resumed) >= 2
        assert await reconciled(w) == []


def kill_workers(w: World) -> None:
    for name in ("weur-prefill", "weur-decode"):
        w.processes[name].kill()


class Crowd:
    """Clients of several kinds, and what each was told."""

    def __init__(self, w: World) -> None:
        self.num_asked = 0
        self.told: dict[str, dict[str, int]] = {}  # by request id
        self.left: dict[str, int] = {}  # tokens heard before leaving
        self.heard: list[Heard] = []
        self._w = w

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        self.heard = [Heard() for _ in range(6)]
        for heard in self.heard[:4]:
            tasks.start_soon(self.read, heard, 80)
        for heard in self.heard[4:]:
            tasks.start_soon(self.read, heard, 60)
        for _ in range(3):
            tasks.start_soon(self.stopped)
            tasks.start_soon(self.leave)

    async def read(self, heard: Heard, max_tokens: int) -> None:
        self.num_asked += 1
        async with self._w.stream("!", max_tokens) as response:
            assert response.status_code == 200, await response.aread()
            async for frame in frames(response):
                assert isinstance(frame, str) or not frame.get("errors"), frame
                if isinstance(frame, dict):
                    heard.text += frame["response"]
                    heard.usage = frame.get("usage", heard.usage)
        if max_tokens <= 60:
            assert heard.text == counted("!", max_tokens)
        assert heard.usage["completion_tokens"] == max_tokens
        self.told[response.headers["x-request-id"]] = heard.usage

    async def stopped(self) -> None:
        """By a string in mid-answer."""
        self.num_asked += 1
        answer = await self._w.raw("!", 60, stop=["XY"])
        result = answer.json()["result"]
        assert result["response"] == counted("!", 54)
        assert result["usage"]["completion_tokens"] == 56
        self.told[answer.headers["x-request-id"]] = result["usage"]

    async def leave(self) -> None:
        """In mid-stream."""
        self.num_asked += 1
        async with self._w.stream("!", LONG) as response:
            assert response.status_code == 200, await response.aread()
            num_heard = 0
            async for frame in frames(response):
                assert isinstance(frame, dict)
                num_heard += len(frame["response"])
                if num_heard > 3:
                    break
        self.left[response.headers["x-request-id"]] = num_heard


async def test_a_killed_edge_loses_no_usage(tmp_path: Path) -> None:
    """Case 25: the rows of requests then in flight are all that the ledger lacks; `fleet reconcile`
    lists them and nothing else, adds them once, and an edge in its place writes on."""
    shape = Shape(regions=BOTH, step_s=0.02, worker_flags=ROOMY)
    async with world(tmp_path, shape) as w:
        for n in range(5):
            assert (await w.raw("A", n + 1)).status_code == 200
        before = {row.request_id for row in await ledger(w, 5)}
        in_flight = await kill_in_flight(w)
        assert {row.request_id for row in ledger_rows(w.usage / "ledger.sqlite")} == before
        found = await reconciled(w, code=1)
        assert len(found) == 8 + 2
        assert {it["request_id"] for it in found} > set(in_flight)
        assert {it["type"] for it in found} == {"missing"}
        await wait_ready(w, await restart(w, "edge", edge_words(w, w.home / "fleet.toml")))
        assert (await w.raw("A", 7)).status_code == 200
        assert len(await reconciled(w, "--apply")) == 10
        assert await reconciled(w) == []
        rows = {row.request_id: row for row in await ledger(w, 1, rows=5 + 10 + 1)}
        for request_id in [it["request_id"] for it in found]:
            row, heard = rows.pop(request_id), in_flight.get(request_id, Heard())
            assert (row.account, row.source, row.outcome) == (ACCOUNT, "journal", "aborted")
            assert (row.prompt_tokens, row.regions in BOTH) == (1, True)
            assert len(heard.text) <= row.completion_tokens < LONG
        assert sorted(row.completion_tokens for row in rows.values()) == [1, 2, 3, 4, 5, 7]
        assert {row.source for row in rows.values()} == {"edge"}


async def kill_in_flight(w: World) -> dict[str, Heard]:
    """Kill the edge while it answers ten: what clients heard of the eight that are streams."""
    streams: dict[str, Heard] = {}
    async with anyio.create_task_group() as tasks:
        for n in range(8):
            tasks.start_soon(hear_until_cut, w, streams, n)
        for _ in range(2):
            tasks.start_soon(ask_until_cut, w)
        with anyio.fail_after(PATIENCE_S):
            while len(streams) < 8 or not all(it.text for it in streams.values()):
                await anyio.sleep(0.005)
            in_flight = "edgefire_front_in_flight"
            while sum([await metric(w, f"{name}-front", in_flight) for name in BOTH]) < 10:
                await anyio.sleep(0.005)
        w.processes["edge"].kill()
    for region in BOTH:
        await wait_metric(w, f"{region}-front", "edgefire_front_in_flight", 0)
        await w.settled(f"{region}-prefill", f"{region}-decode")
    return streams


async def hear_until_cut(w: World, in_flight: dict[str, Heard], n: int) -> None:
    """A stream, near the one region or the other, from an edge that will be killed."""
    near = w.headers() if n % 2 else w.headers({"cf-iplatitude": "42.36", "cf-iplongitude": "-71"})
    body = {"prompt": "!", "raw": True, "max_tokens": LONG, "stream": True}
    with pytest.raises(httpx2.TransportError):  # noqa: PT012
        async with w.client.stream("POST", w.run_url(), json=body, headers=near) as response:
            heard = in_flight[response.headers["x-request-id"]] = Heard()
            async for frame in frames(response):
                assert isinstance(frame, dict)
                heard.text += frame["response"]


async def ask_until_cut(w: World) -> None:
    with pytest.raises(httpx2.TransportError):
        await w.raw("!", LONG)


@pytest.mark.slow
async def test_a_killed_front_costs_no_row(tmp_path: Path) -> None:
    """Its journal lacks what it was at; the ledger has it all, and reconciliation says which."""
    shape = Shape(regions=BOTH, step_s=0.02, worker_flags=ROOMY)
    async with world(tmp_path, shape) as w:
        assert (await w.raw("A", 5)).status_code == 200
        await ledger(w, 1)
        crowd = Crowd(w)
        async with anyio.create_task_group() as tasks:
            heard = Heard()
            tasks.start_soon(crowd.read, heard, 60)
            await heard.until(5)
            process = await restart(w, "weur-front", front_words(w, "weur"))
        await wait_ready(w, process)
        await nothing_in_flight(w)
        [in_flight] = crowd.told
        rows = await ledger(w, 2)
        assert [(row.completion_tokens, row.whole) for row in rows] == [(5, True), (60, True)]
        assert rows[1].regions == "weur,enam"
        [short] = await reconciled(w)
        assert (short["type"], short["request_id"], short["told"]) == ("short", in_flight, 60)
        assert 0 < short["known"] < 60


async def ledger(w: World, num_ended: int, *, rows: int | None = None) -> list[LedgerRow]:
    """All rows in the order of their starts, once this edge has ended so many requests and has
    nothing more to write."""
    await wait_metric(w, "edge", "edgefire_edge_requests_total", num_ended)
    await wait_metric(w, "edge", "edgefire_edge_ledger_pending", 0)
    found = ledger_rows(w.usage / "ledger.sqlite")
    assert len(found) == (num_ended if rows is None else rows)
    return sorted(found, key=lambda row: row.started)


async def reconciled(w: World, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """What `fleet reconcile` finds in the folder of `fleet up`."""
    command = [sys.executable, "-m", "routing", "reconcile", "--settle-s", "0", "--json", *words]
    done = await to_thread.run_sync(
        lambda: subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "EDGEFIRE_HOME": str(w.home)},
            timeout=60,
            check=False,
        )
    )
    assert done.returncode == code, done.stdout + done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings
