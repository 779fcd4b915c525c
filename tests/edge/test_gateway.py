"""What requests ask for by headers: once, from the cache, in the logs. Two edges over one store."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from edge import keys, replies
from edge.app import unix_time
from edge.replies import Kept, Slot
from edge.store import Store
from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, no_gate, refusing
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over
from tests.fakes.events import read_all

OTHER = "globex"


@pytest.fixture
async def edges(
    tmp_path: Path, region: CountingRegion
) -> AsyncGenerator[tuple[EdgeClient, EdgeClient], None]:
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                edge_over(tmp_path, [region.region], store=tmp_path / "store.sqlite")
            )
            for _ in range(2)
        ]
        yield first, second


@pytest.fixture
def edge(edges: tuple[EdgeClient, EdgeClient]) -> EdgeClient:
    return edges[0]


def asked(prompt: str = "A", **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "raw": True, "max_tokens": 3, **fields}


async def run(
    edge: EdgeClient, body: object = None, *, query: str = "", **headers: str
) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await edge.http.post(
        edge.run_url + query,
        json=asked() if body is None else body,
        headers={**edge.headers(), **named},
    )


async def other_account(
    edge: EdgeClient, tmp_path: Path, path: str, **more: Any
) -> httpx2.Response:
    key = keys.create(tmp_path / "keys", OTHER, days=1, now=unix_time())
    headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})}
    url = f"{edge.ai}/{path}".replace(ACCOUNT, OTHER)
    return await edge.http.request(more.pop("method", "GET"), url, headers=headers, **more)


# Idempotency keys


async def test_a_key_is_asked_once_and_told_again_by_any_edge(
    edges: tuple[EdgeClient, EdgeClient], region: CountingRegion
) -> None:
    first = await run(edges[0], idempotency_key="k")
    assert "idempotent-replayed" not in first.headers
    again = await run(edges[1], idempotency_key="k")
    assert again.headers["idempotent-replayed"] == "true"
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-served-by"] == "weur"
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(region.asked) == 1


async def test_a_stream_is_told_again_as_a_stream(edge: EdgeClient, region: CountingRegion) -> None:
    said = []
    for _ in range(2):
        url, headers = edge.run_url, {**edge.headers(), "idempotency-key": "s"}
        async with edge.http.stream("POST", url, json=asked(stream=True), headers=headers) as it:
            said.append((it.headers["content-type"], *(await read_all(it))))
    assert said[0] == said[1]
    assert said[0][1:] == (
        "BCD",
        {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
        True,
    )
    assert len(region.asked) == 1


async def test_a_key_with_another_body_is_refused(edge: EdgeClient) -> None:
    await run(edge, idempotency_key="k")
    answer = await run(edge, asked("B"), idempotency_key="k")
    assert answer.status_code == 422
    assert "another request" in answer.json()["errors"][0]["message"]


async def test_a_key_is_the_accounts_own(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path
) -> None:
    await run(edge, idempotency_key="k")
    headers = {"idempotency-key": "k"}
    answer = await other_account(
        edge, tmp_path, f"run/{MODEL}", method="POST", json=asked("B"), headers=headers
    )
    assert answer.json()["result"]["response"] == "CDE"
    assert len(region.asked) == 2


async def test_who_asks_the_same_at_once_is_told_to_wait(
    edges: tuple[EdgeClient, EdgeClient], region: CountingRegion
) -> None:
    region.gate = steps = Steps(allowed=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run(edges[0], idempotency_key="k"))
        await region.wait_asked()
        answer = await run(edges[1], idempotency_key="k")
        assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
        steps.allow(100)
    assert (await run(edges[1], idempotency_key="k")).headers["idempotent-replayed"] == "true"
    assert len(region.asked) == 1


async def test_what_failed_may_be_tried_again(edge: EdgeClient, region: CountingRegion) -> None:
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    assert (await run(edge, idempotency_key="k")).status_code == 429
    region.started_gate = no_gate
    assert (await run(edge, idempotency_key="k")).status_code == 200
    assert (await run(edge, asked(max_tokens=0), idempotency_key="bad")).status_code == 400
    assert (await run(edge, idempotency_key="bad")).status_code == 200


async def test_a_stream_that_broke_is_not_kept(edge: EdgeClient, region: CountingRegion) -> None:
    """The key is free before the end is told: who tries again at once need not wait."""
    for key in "abcdefgh":
        region.gate = refusing(Failure(Code.INTERNAL, "a bug"), at=2)
        answer = await run(edge, asked(stream=True), idempotency_key=key)
        assert "[DONE]" not in answer.text
        region.gate = no_gate
        answer = await run(edge, asked(stream=True), idempotency_key=key)
        assert "idempotent-replayed" not in answer.headers
        assert "[DONE]" in answer.text


async def test_who_hangs_up_may_come_again(edge: EdgeClient, region: CountingRegion) -> None:
    region.gate = steps = Steps(allowed=1)
    with anyio.move_on_after(0.5):
        await run(edge, idempotency_key="k")
    await region.wait_idle()
    steps.allow(100)
    with anyio.fail_after(10):
        while (answer := await run(edge, idempotency_key="k")).status_code == 409:
            await anyio.sleep(0.02)
    assert answer.json()["result"]["response"] == "BCD"


async def test_a_queued_request_is_queued_once(edge: EdgeClient) -> None:
    first = await run(edge, query="?queueRequest=true", idempotency_key="k")
    again = await run(edge, query="?queueRequest=true", idempotency_key="k")
    assert first.json()["result"]["request_id"] == again.json()["result"]["request_id"]


@pytest.mark.parametrize("key", ["", "a" * 256])
async def test_a_key_that_is_none(edge: EdgeClient, key: str) -> None:
    answer = await run(edge, idempotency_key=key)
    assert answer.status_code == 400
    assert "idempotency-key" in answer.text


# The cache


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
    assert await store.write(lambda db: replies.prune(db, 6.5, 3, most_bytes=700)) == 3
    left = await store.read(lambda db: db.execute("SELECT name FROM replies").fetchall())
    assert sorted(left) == [(f"n{n}",) for n in range(5, 10)]
    slot = Slot(kind="cache", account="a", name="n9", digest="")
    assert await store.read(lambda db: replies.look(db, slot, 1008.9)) == kept
    assert await store.read(lambda db: replies.look(db, slot, 1009.1)) is None
    store.close()


# Logs


async def logs(edge: EdgeClient, count: int, **query: object) -> dict[str, Any]:
    """A page of the logs, once there are so many in all."""
    with anyio.fail_after(10):
        while True:
            url = f"{edge.ai}/logs"
            answer = await edge.http.get(url, params=query, headers=edge.headers())  # type: ignore[arg-type]
            assert answer.status_code == 200, answer.text
            found = answer.json()
            if found["result_info"]["total_count"] == count:
                return found
            await anyio.sleep(0.05)


async def test_requests_are_logged(edges: tuple[EdgeClient, EdgeClient]) -> None:
    metadata = msgspec.json.encode({"team": "b_c%", "n": 1, "test": True}).decode()
    first = await run(edges[0], cf_aig_metadata=metadata, cf_aig_cache_ttl="60")
    await run(edges[1], cf_aig_cache_ttl="60")
    await run(edges[0], asked(max_tokens=0))
    await run(edges[0], cf_aig_collect_log="false")
    found = await logs(edges[1], 3)
    assert found["success"] is True
    assert found["result_info"] == {
        "page": 1, "per_page": 20, "count": 3, "total_count": 3, "total_pages": 1
    }  # fmt: skip
    bad, hit, miss = found["result"]
    assert miss["id"] == first.headers["x-request-id"]
    assert miss["metadata"] == {"team": "b_c%", "n": 1, "test": True}
    assert (miss["model"], miss["status"], miss["success"]) == (MODEL, 200, True)
    assert (miss["prompt_tokens"], miss["completion_tokens"], miss["region"]) == (1, 3, "weur")
    assert miss["latency_ms"] >= miss["ttft_ms"] > 0
    assert (miss["cached"], hit["cached"], hit["model"], hit["prompt_tokens"]) == (
        False, True, MODEL, 0
    )  # fmt: skip
    assert (bad["status"], bad["outcome"], bad["success"]) == (400, "bad_input", False)
    assert "/max_tokens" in bad["detail"]
    assert "request" not in miss


async def test_logs_are_searched_and_paged(
    edges: tuple[EdgeClient, EdgeClient], tmp_path: Path
) -> None:
    edge = edges[0]
    first = await run(edge, cf_aig_metadata='{"team":"b_c%"}')
    await run(edge)
    await run(edge, asked(max_tokens=0))
    log = first.headers["x-request-id"]
    assert len((await logs(edge, 1, search="B_C%"))["result"]) == 1
    assert (await logs(edge, 0, search="BxC"))["result"] == []
    assert len((await logs(edge, 3, model=MODEL))["result"]) == 3
    assert len((await logs(edge, 1, status=400))["result"]) == 1
    assert (await logs(edge, 0, model="@cf/other"))["result"] == []
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    await logs(edge, 3, to=soon)
    await logs(edge, 0, **{"from": soon})
    assert [it["id"] for it in (await logs(edge, 3, page=2, per_page=2))["result"]] == [log]
    assert (await logs(edge, 3, page=3, per_page=2))["result"] == []
    other = await other_account(edge, tmp_path, "logs")
    assert other.json()["result"] == []
    other = await other_account(edge, tmp_path, f"logs/{log}")
    assert other.status_code == 404


async def test_bodies_are_kept_where_that_is_asked(edge: EdgeClient) -> None:
    answer = await run(edge, cf_aig_collect_log_payload="true")
    await run(edge, cf_aig_collect_log="true", cf_aig_collect_log_payload="false")
    [without, entry] = (await logs(edge, 2))["result"]
    url = f"{edge.ai}/logs/{entry['id']}"
    shown = (await edge.http.get(url, headers=edge.headers())).json()["result"]
    assert msgspec.json.decode(shown["request"]) == asked()
    assert shown["response"] == answer.text
    url = f"{edge.ai}/logs/{without['id']}"
    shown = (await edge.http.get(url, headers=edge.headers())).json()["result"]
    assert (shown["request"], shown["response"]) == (None, None)


@pytest.mark.parametrize(
    "metadata", ["{", "[]", '{"a":{}}', '{"a":null}', '{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1}']
)
async def test_metadata_that_is_none(edge: EdgeClient, metadata: str) -> None:
    answer = await run(edge, cf_aig_metadata=metadata)
    assert answer.status_code == 400
    assert "cf-aig-metadata" in answer.text


@pytest.mark.parametrize(
    "query", ["page=0", "per_page=101", "status=1", "page=x", "from=yesterday", "to=99999999999999"]
)
async def test_questions_that_are_none(edge: EdgeClient, query: str) -> None:
    answer = await edge.http.get(f"{edge.ai}/logs?{query}", headers=edge.headers())
    assert answer.status_code == (200 if query.startswith("to=9") else 400), answer.text
    assert answer.status_code == 200 or f"'/{query.partition('=')[0]}'" in answer.text


# Without the store


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
