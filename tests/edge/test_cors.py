"""What browsers ask before a page may ask, and what lets a page read the answer."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from edge.cors import EXPOSED
from tests.fakes.counting_region import CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.events import read_all

PAGE = "https://app.example"
ALLOW = "access-control-allow-origin"


async def preflight(edge: EdgeClient, url: str, origin: str = PAGE) -> httpx2.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-session-affinity",
    }
    return await edge.http.options(url, headers=headers)


async def test_a_preflight_needs_no_key_and_names_what_may_be_sent(edge: EdgeClient) -> None:
    for url in (edge.run_url, edge.chat_url, f"{edge.ai}/usage", f"{edge.url}/v1/models"):
        answer = await preflight(edge, url)
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers[ALLOW] == "*"
        allowed = answer.headers["access-control-allow-headers"]
        assert allowed == "authorization,content-type,x-session-affinity"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in answer.headers


async def test_a_page_may_read_answers_streams_and_refusals(edge: EdgeClient) -> None:
    headers = edge.headers() | {"origin": PAGE}
    body = {"prompt": "AB", "raw": True, "max_tokens": 3}
    for more, status in (({}, 200), ({"stream": True}, 200), ({"prompt": ""}, 400)):
        async with edge.http.stream(
            "POST", edge.run_url, json=body | more, headers=headers
        ) as answer:
            await answer.aread()
        assert answer.status_code == status
        assert answer.headers[ALLOW] == "*"
        exposed = answer.headers["access-control-expose-headers"]
        assert {"x-served-by", "x-request-id", "retry-after"} <= set(exposed.split(", "))
    answer = await edge.http.post(edge.run_url, json=body, headers={"origin": PAGE})
    assert (answer.status_code, answer.headers[ALLOW]) == (401, "*")


async def test_who_sends_no_origin_gets_no_such_headers(edge: EdgeClient) -> None:
    answer = await edge.raw("A")
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_an_options_request_that_is_no_preflight_is_a_wrong_method(edge: EdgeClient) -> None:
    assert (await edge.http.options(edge.run_url)).status_code == 405


async def test_what_operators_read_is_not_for_pages(edge: EdgeClient) -> None:
    for path in ("/metrics", "/v1/report", "/health"):
        answer = await edge.http.get(f"{edge.url}{path}", headers={"origin": PAGE})
        assert ALLOW not in answer.headers
        assert (await preflight(edge, f"{edge.url}{path}")).status_code == 405


@pytest.mark.parametrize("origins", [(PAGE, "https://b.example"), ()])
async def test_only_named_origins_may(tmp_path: Path, origins: tuple[str, ...]) -> None:
    fake = CountingRegion()
    async with (
        running(fake),
        edge_over(tmp_path, [fake.region], cors_origins=origins) as edge,
    ):
        for origin in (PAGE, "https://evil.example", "null"):
            may = origin in origins
            told = (await preflight(edge, edge.run_url, origin)).headers
            assert told.get(ALLOW) == (origin if may else None)
            assert ("access-control-allow-methods" in told) is may
            headers = edge.headers() | {"origin": origin}
            body = {"prompt": "A", "raw": True, "max_tokens": 1}
            answer = await edge.http.post(edge.run_url, json=body, headers=headers)
            assert answer.status_code == 200  # who asks past a browser is asked for a key
            assert answer.headers.get(ALLOW) == (origin if may else None)
            assert ("origin" in answer.headers.get("vary", "")) is bool(origins)


async def test_streams_come_as_they_are_made(edge: EdgeClient) -> None:
    async with edge.stream("AB", 4, {"origin": PAGE}) as answer:
        assert await read_all(answer) == ("CDEF", answer_usage(2, 4), True)


def answer_usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def test_every_header_of_ours_is_exposed() -> None:
    for name in ("cf-aig-step", "cf-aig-model", "x-ratelimit-remaining-requests", "retry-after"):
        assert name in EXPOSED.split(", ")
