"""Idempotency keys: a request is asked once, and told again as often as it is sent."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from routing.errors import Code, Failure
from tests.edge.gateway import asked, edge, edges, other_account, run
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, no_gate, refusing
from tests.fakes.edge_client import EdgeClient
from tests.fakes.events import read_all

__all__ = ["edge", "edges"]  # fixtures


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
