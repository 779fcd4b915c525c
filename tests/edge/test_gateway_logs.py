"""Request logs: written by two edges, searched at either."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.edge.gateway import asked, edge, edges, other_account, run
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import EdgeClient

__all__ = ["edge", "edges"]  # fixtures


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


async def test_a_search_for_much_keeps_nobody_from_the_store(edge: EdgeClient) -> None:
    await run(edge)
    await logs(edge, 1)
    await logs(edge, 0, search="x" * 50_001)
    await logs(edge, 1)


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
