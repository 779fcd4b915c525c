"""The response cache, of two edges over one store."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from edge import replies
from edge.app import unix_time
from edge.replies import Kept, Slot
from edge.store import Store
from routing.errors import Code, Failure
from tests.edge.gateway import asked, edge, edges, other_account, run
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, no_gate, refusing
from tests.fakes.edge_client import EdgeClient

__all__ = ["edge", "edges"]  # fixtures


async def test_the_cache_tells_again_what_is_the_same(
    edges: tuple[EdgeClient, EdgeClient], region: CountingRegion
) -> None:
    first = await run(edges[0], asked("A", stop=None), cf_aig_cache_ttl="60")
    assert first.headers["cf-aig-cache-status"] == "MISS"
    turned = dict(reversed(list(asked("A", stop=None).items())))
    again = await run(edges[1], turned, cf_aig_cache_ttl="60")
    assert again.headers["cf-aig-cache-status"] == "HIT"
    assert again.content == first.content
    other = await run(edges[1], asked("B"), cf_aig_cache_ttl="60")
    assert (other.headers["cf-aig-cache-status"], len(region.asked)) == ("MISS", 2)
    plain = await run(edges[0])
    assert "cf-aig-cache-status" not in plain.headers
    skipped = await run(edges[0], cf_aig_cache_ttl="60", cf_aig_skip_cache="true")
    assert "cf-aig-cache-status" not in skipped.headers
    assert len(region.asked) == 4


async def test_a_cached_stream_is_one_burst(edge: EdgeClient, region: CountingRegion) -> None:
    said = [await run(edge, asked(stream=True), cf_aig_cache_ttl="60") for _ in range(2)]
    assert said[0].text == said[1].text
    assert [it.headers["cf-aig-cache-status"] for it in said] == ["MISS", "HIT"]
    whole = await run(edge, cf_aig_cache_ttl="60")
    assert whole.headers["cf-aig-cache-status"] == "MISS"
    assert len(region.asked) == 2


async def test_a_key_of_ones_own(edge: EdgeClient, region: CountingRegion) -> None:
    said = [await run(edge, asked(it), cf_aig_cache_key="mine") for it in "AB"]
    assert [it.json()["result"]["response"] for it in said] == ["BCD", "BCD"]
    streamed = await run(edge, asked(stream=True), cf_aig_cache_key="mine")
    assert streamed.headers["content-type"].startswith("text/event-stream")


async def test_the_cache_is_the_accounts_own(edge: EdgeClient, tmp_path: Path) -> None:
    await run(edge, cf_aig_cache_ttl="60")
    headers = {"cf-aig-cache-ttl": "60"}
    answer = await other_account(
        edge, tmp_path, f"run/{MODEL}", method="POST", json=asked(), headers=headers
    )
    assert answer.headers["cf-aig-cache-status"] == "MISS"


async def test_many_at_once_are_one(
    edges: tuple[EdgeClient, EdgeClient], region: CountingRegion
) -> None:
    region.gate = steps = Steps(allowed=1)
    said: list[httpx2.Response] = []

    async def ask(edge: EdgeClient) -> None:
        said.append(await run(edge, cf_aig_cache_ttl="60"))

    async with anyio.create_task_group() as tasks:
        for n in range(10):
            tasks.start_soon(ask, edges[n % 2])
        await region.wait_asked()
        await anyio.sleep(0.3)
        assert len(region.asked) == 1
        steps.allow(100)
    assert sorted(it.headers["cf-aig-cache-status"] for it in said) == ["HIT"] * 9 + ["MISS"]
    assert {it.json()["result"]["response"] for it in said} == {"BCD"}
    assert len(region.asked) == 1


async def test_when_the_first_fails_the_others_ask_for_themselves(
    edges: tuple[EdgeClient, EdgeClient], region: CountingRegion
) -> None:
    steps = Steps()

    async def first_fails(request: Any, index: int) -> None:
        await steps(request, index)
        if request is region.asked[0]:
            raise Failure(Code.INTERNAL, "a bug")

    region.started_gate = first_fails
    said: list[int] = []

    async def ask(edge: EdgeClient) -> None:
        said.append((await run(edge, cf_aig_cache_ttl="60")).status_code)

    async with anyio.create_task_group() as tasks:
        for n in range(4):
            tasks.start_soon(ask, edges[n % 2])
        await region.wait_asked()
        await anyio.sleep(0.2)
        steps.allow(1)
    assert sorted(said) == [200, 200, 200, 500]
    assert len(region.asked) == 4


async def test_when_the_first_is_dead_another_is_the_first(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path
) -> None:
    """As an edge leaves it that was killed: a row with a lease, and nobody who renews it."""
    await run(edge, cf_aig_cache_ttl="60")
    db = sqlite3.connect(tmp_path / "store.sqlite")
    db.execute(
        "UPDATE replies SET status = NULL, body = NULL, lease_until = ?", (unix_time() + 0.6,)
    )
    db.commit()
    db.close()
    said: list[httpx2.Response] = []

    async def ask() -> None:
        said.append(await run(edge, cf_aig_cache_ttl="60"))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ask)
    assert sorted(it.headers["cf-aig-cache-status"] for it in said) == ["HIT", "HIT", "MISS"]
    assert len(region.asked) == 2


async def test_who_waits_for_the_first_may_leave(edge: EdgeClient, region: CountingRegion) -> None:
    region.gate = steps = Steps(allowed=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run(edge, cf_aig_cache_ttl="60"))
        await region.wait_asked()
        with anyio.move_on_after(0.3):
            await run(edge, cf_aig_cache_ttl="60")
        await edge.wait_metric("edgefire_edge_requests_total", 1, outcome="hung_up")
        steps.allow(100)


async def test_what_failed_is_not_cached(edge: EdgeClient, region: CountingRegion) -> None:
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    answer = await run(edge, cf_aig_cache_ttl="60")
    assert answer.status_code == 429
    region.started_gate = no_gate
    assert (await run(edge, cf_aig_cache_ttl="60")).status_code == 200


@pytest.mark.parametrize("ttl", ["0", "-1", "1.5", "2592001", "x"])
async def test_a_time_that_is_none(edge: EdgeClient, ttl: str) -> None:
    answer = await run(edge, cf_aig_cache_ttl=ttl)
    assert answer.status_code == 400
    assert "cf-aig-cache-ttl" in answer.text


async def test_what_has_had_its_time_goes(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    kept = Kept(status=200, headers=[], model="m", body=b"x" * 100)

    def put(name: str, now: float, ttl_s: float) -> None:
        slot = Slot(kind="cache", account="a", name=name, digest="")

        def work(db: sqlite3.Connection) -> None:
            assert replies.claim(db, slot, "h", now) is None
            replies.keep(db, slot, "h", kept, now + ttl_s)

        works.append(work)

    works: list[Any] = []
    for n in range(10):
        put(f"n{n}", float(n), 5.0 if n < 2 else 1000.0)
    for work in works:
        await store.write(work)
    assert await store.write(lambda db: replies.prune(db, 6.5, 100)) == 2
    assert await store.write(lambda db: replies.prune(db, 6.5, 100)) == 0
    assert await store.write(lambda db: replies.prune(db, 6.5, 100, cache_bytes=500)) == 3
    left = await store.read(lambda db: db.execute("SELECT name FROM replies").fetchall())
    assert sorted(left) == [(f"n{n}",) for n in range(5, 10)]
    slot = Slot(kind="cache", account="a", name="n9", digest="")
    assert await store.read(lambda db: replies.look(db, slot, 1008.9)) == kept
    assert await store.read(lambda db: replies.look(db, slot, 1009.1)) is None
    store.close()


async def test_what_one_account_asks_once_takes_nothing_from_another(tmp_path: Path) -> None:
    """Of answers by idempotency keys the oldest of an account go that has too many."""
    store = Store(tmp_path / "store.sqlite")
    kept = Kept(status=200, headers=[], model="m", body=b"x" * 100)

    def fill(db: sqlite3.Connection) -> None:
        for n in range(12):  # the first two are of another account
            account = "b" if n < 2 else "a"
            slot = Slot(kind="key", account=account, name=f"n{n}", digest="")
            assert replies.claim(db, slot, "h", float(n)) is None
            replies.keep(db, slot, "h", kept, 1000.0)

    await store.write(fill)
    assert await store.write(lambda db: replies.prune(db, 20.0, 100, key_bytes=600)) == 4
    left = await store.read(lambda db: db.execute("SELECT name FROM replies").fetchall())
    assert {name for (name,) in left} == {"n0", "n1"} | {f"n{n}" for n in range(6, 12)}
    store.close()


async def test_the_store_is_away(edge: EdgeClient, region: CountingRegion, tmp_path: Path) -> None:
    """Only what needs it fails; what does not need it does not wait."""
    db = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        assert (await run(edge)).status_code == 200
        cached = await run(edge, cf_aig_cache_ttl="60")
        assert (cached.status_code, cached.headers["cf-aig-cache-status"]) == (200, "MISS")
        for refused in (
            await run(edge, idempotency_key="k"),
            await run(edge, query="?queueRequest=true"),
        ):
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        assert (await run(edge)).status_code == 200
    finally:
        db.execute("ROLLBACK")
        db.close()
    with anyio.fail_after(10):
        while (await run(edge, idempotency_key="k")).status_code == 503:
            await anyio.sleep(0.1)
