"""Queued requests of the native API, over a real edge and a region that counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from edge import keys
from edge.app import unix_time
from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, refusing
from tests.fakes.edge_client import ACCOUNT, EdgeClient

OTHER = "globex"


@pytest.fixture
def edge_settings(tmp_path: Path) -> dict[str, Any]:
    return {"store": tmp_path / "store.sqlite"}


def asked(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "raw": True, "max_tokens": 3, **fields}


async def queue(edge: EdgeClient, body: object, **more: Any) -> httpx2.Response:
    url = f"{edge.run_url}?queueRequest=true"
    return await edge.http.post(url, json=body, headers=edge.headers(), **more)


async def ended(edge: EdgeClient, request_id: str) -> dict[str, Any]:
    """The result of a job, once it has one."""
    with anyio.fail_after(20):
        while True:
            answer = await queue(edge, {"request_id": request_id})
            assert answer.status_code == 200, answer.text
            result = answer.json()["result"]
            if "responses" in result:
                return result
            assert result["status"] in {"queued", "running"}
            await anyio.sleep(0.02)


async def test_many_are_queued_and_answered(edge: EdgeClient, region: CountingRegion) -> None:
    requests = [asked("A", external_reference="first"), asked("K"), asked("P")]
    answer = await queue(edge, {"requests": requests})
    assert answer.status_code == 200
    told = answer.json()
    assert told["success"] is True
    assert told["result"] | {"request_id": ""} == {
        "status": "queued", "request_id": "", "model": MODEL
    }  # fmt: skip
    result = await ended(edge, told["result"]["request_id"])
    assert [r["id"] for r in result["responses"]] == [0, 1, 2]
    assert [r["result"]["response"] for r in result["responses"]] == ["BCD", "LMN", "QRS"]
    assert [r["success"] for r in result["responses"]] == [True] * 3
    assert [r.get("external_reference") for r in result["responses"]] == ["first", None, None]
    assert result["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert {it.priority for it in region.asked} == {-1}


def limited_key(home: Path, *limits: str, priority: int = 0) -> str:
    grant = keys.Grant(limits=limits, priority=priority)
    return keys.create(home / "keys", ACCOUNT, days=1, now=unix_time(), grant=grant)


async def test_what_its_key_may_use_holds_for_a_job(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path
) -> None:
    """Requests over its limit wait for their turn; another key's are answered meanwhile."""
    limited = replace(edge, key=limited_key(tmp_path, "requests=1/hour", priority=-7))
    answer = await queue(limited, {"requests": [asked("A"), asked("K")]})
    await edge.wait_metric("edgefire_edge_job_requests_total", 1, kind="queue", outcome="ok")
    other = (await queue(edge, asked("P"))).json()["result"]["request_id"]
    [response] = (await ended(edge, other))["responses"]
    assert response["result"]["response"] == "QRS"
    request_id = answer.json()["result"]["request_id"]
    told = (await queue(limited, {"request_id": request_id})).json()["result"]
    assert told["status"] == "running"
    assert sorted(it.priority for it in region.asked) == [-7, -1]


async def test_looking_for_room_uses_up_no_limit(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path
) -> None:
    """A job's request counts once, however often it is tried."""
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"), times=3)
    limited = replace(edge, key=limited_key(tmp_path, "requests=2/hour"))
    request_id = (await queue(limited, asked("A"))).json()["result"]["request_id"]
    [response] = (await ended(limited, request_id))["responses"]
    assert response["result"]["response"] == "BCD"
    assert (await limited.raw("A")).headers["x-ratelimit-remaining-requests"] == "0"
    assert (await limited.raw("A")).status_code == 429


async def test_a_revoked_key_ends_what_it_has_queued(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path
) -> None:
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    key = limited_key(tmp_path)
    answer = await queue(replace(edge, key=key), {"requests": [asked("A")] * 3})
    await region.wait_asked(2)
    keys.revoke(tmp_path / "keys", key)
    result = await ended(edge, answer.json()["result"]["request_id"])
    assert [it["success"] for it in result["responses"]] == [False] * 3
    for response in result["responses"]:
        assert response["errors"] == [{"code": 10000, "message": "Authentication error"}]


async def test_one_request_is_queued_too(edge: EdgeClient) -> None:
    answer = await queue(edge, asked("A"))
    [response] = (await ended(edge, answer.json()["result"]["request_id"]))["responses"]
    assert (response["id"], response["result"]["response"]) == (0, "BCD")


async def queue_by_body(edge: EdgeClient, body: object) -> httpx2.Response:
    url = f"{edge.ai}/run?queueRequest=true"
    return await edge.http.post(url, json=body, headers=edge.headers())


async def test_the_route_that_names_the_model_in_its_body_queues_too(edge: EdgeClient) -> None:
    given = {"requests": [asked("A"), asked("K")]}
    answer = await queue_by_body(edge, {"model": MODEL, "input": given})
    told = answer.json()["result"]
    assert (told["status"], told["model"]) == ("queued", MODEL)
    result = await ended(edge, told["request_id"])
    assert [r["result"]["response"] for r in result["responses"]] == ["BCD", "LMN"]
    for body in (
        {"request_id": told["request_id"]},
        {"model": MODEL, "input": {"request_id": told["request_id"]}},
    ):
        assert (await queue_by_body(edge, body)).json()["result"] == result
    await edge.wait_metric("edgefire_edge_job_requests_total", 2, kind="queue", outcome="ok")


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({"requests": [asked("A", max_tokens=0)]}, "/input/requests/0/max_tokens"),
        (asked("A", max_tokens=0), "/input/max_tokens"),
        ({"requests": []}, "/input/requests"),
    ],
)
async def test_what_is_wrong_there_is_named_where_it_is(
    edge: EdgeClient, given: object, pointer: str
) -> None:
    answer = await queue_by_body(edge, {"model": MODEL, "input": given})
    assert answer.status_code == 400
    assert f"'{pointer}'" in answer.json()["errors"][0]["message"]


@pytest.mark.parametrize(
    ("request_", "pointer"),
    [
        (asked("A", max_tokens=0), "/requests/1/max_tokens"),
        ({"max_tokens": 3}, "/requests/1"),
        (asked("A", stream=True), "/requests/1/stream"),
        ("A", "/requests/1"),
        (asked("A", external_reference=5), "/requests/1/external_reference"),
    ],
)
async def test_one_that_is_bad_refuses_all(
    edge: EdgeClient, region: CountingRegion, request_: object, pointer: str
) -> None:
    answer = await queue(edge, {"requests": [asked("A"), request_]})
    assert answer.status_code == 400
    [error] = answer.json()["errors"]
    assert error["code"] == 5006
    assert f"'{pointer}'" in error["message"], error
    await anyio.sleep(0.1)
    assert region.asked == []


@pytest.mark.parametrize("body", [{"requests": []}, {"requests": {}}, {"webhook": "ftp://a/"}])
async def test_a_bad_whole_is_refused(edge: EdgeClient, body: dict[str, object]) -> None:
    if "webhook" in body:
        body = asked("A") | body
    answer = await queue(edge, body)
    assert answer.status_code == 400, answer.text
    assert f"'/{next(name for name in ('webhook', 'requests') if name in body)}'" in answer.text


@pytest.mark.slow
async def test_ten_megabytes_and_no_more(edge: EdgeClient) -> None:
    few = {"requests": [asked("A" * 9_900_000, max_tokens=1)]}
    answer = await queue(edge, few)
    assert answer.status_code == 200, answer.text
    [response] = (await ended(edge, answer.json()["result"]["request_id"]))["responses"]
    assert response["success"] is False  # longer than the window, which only its tokens tell
    assert response["errors"][0]["code"] == 5006
    answer = await queue(edge, {"requests": [asked("A" * 10_000_000)]})
    assert answer.status_code == 413


async def test_another_account_does_not_find_it(edge: EdgeClient, tmp_path: Path) -> None:
    request_id = (await queue(edge, asked("A"))).json()["result"]["request_id"]
    key = keys.create(tmp_path / "keys", OTHER, days=1, now=unix_time())
    url = f"{edge.run_url.replace(ACCOUNT, OTHER)}?queueRequest=true"
    headers = {"authorization": f"Bearer {key}"}
    answer = await edge.http.post(url, json={"request_id": request_id}, headers=headers)
    assert answer.status_code == 404
    assert (await queue(edge, {"request_id": "nobody"})).status_code == 404


async def test_a_full_region_is_asked_again(edge: EdgeClient, region: CountingRegion) -> None:
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    request_id = (await queue(edge, asked("A"))).json()["result"]["request_id"]
    await region.wait_asked(2)

    async def let_in(request: object, index: int) -> None:
        await anyio.lowlevel.checkpoint()

    region.started_gate = let_in
    [response] = (await ended(edge, request_id))["responses"]
    assert response["result"]["response"] == "BCD"
