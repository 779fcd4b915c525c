"""What a client sees over HTTP: addresses, keys, bodies, headers, and errors in two dialects."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx2
import msgspec
import pytest

from edge import keys
from edge.app import unix_time
from routing.errors import Code, Failure
from routing.region import ProcessReport
from routing.secret import bearer
from tests.fakes.counting_region import MODEL, SECRET, CountingRegion, Steps, refusing, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over
from tests.fakes.events import frames, read_all


@pytest.fixture
def edge_settings() -> dict[str, Any]:
    return {"body_limit_bytes": 100_000}


def native_error(answer: httpx2.Response) -> tuple[int, int, str]:
    """Status, code and message of a v4 envelope."""
    body = answer.json()
    assert body["result"] is None
    assert body["success"] is False
    assert body["messages"] == []
    [error] = body["errors"]
    assert answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text
    return answer.status_code, error["code"], error["message"]


async def test_a_whole_answer(edge: EdgeClient) -> None:
    answer = await edge.raw("AB", 5)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-served-by"] == "weur"
    assert answer.json()["result"] == {
        "response": "CDEFG",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7},
    }


async def test_a_streamed_answer(edge: EdgeClient) -> None:
    async with edge.stream("AB", 3) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-served-by"] == "weur"
        body = await response.aread()
    usage = '{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5}'
    assert body.decode() == (
        'data: {"response":"C","p":"abcdefghijklmnopqrstuvwxyz012"}\n\n'
        'data: {"response":"D","p":"abcdefghijklmnopqrstuvwxyz012"}\n\n'
        'data: {"response":"E","p":"abcdefghijklmnopqrstuvwxyz012"}\n\n'
        f'data: {{"response":"","finish_reason":"length","usage":{usage}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_openai_whole_and_streamed(edge: EdgeClient) -> None:
    whole = (await edge.chat("hello", max_tokens=4)).json()
    assert whole["choices"][0]["message"]["content"] == "ABCD"
    assert whole["usage"]["completion_tokens"] == 4
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    async with edge.http.stream(
        "POST", edge.chat_url, json=body | {"stream": True}, headers=edge.headers()
    ) as response:
        assert response.headers["x-served-by"] == "weur"
        *chunks, done = [frame async for frame in frames(response)]
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if isinstance(chunk, dict)]
    assert "".join(delta.get("content", "") for delta in deltas) == "ABCD"


async def test_logprobs_are_spelled_in_text(edge: EdgeClient) -> None:
    answer = await edge.chat("hello", max_tokens=2, logprobs=True, top_logprobs=2)
    [first, second] = answer.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"]) == ("A", 0.0)
    assert [top["token"] for top in second["top_logprobs"]] == ["B", "C"]


async def test_text_is_sent_as_it_is_made(edge: EdgeClient, region: CountingRegion) -> None:
    """Each token is let out only after the one before it has reached the client."""
    region.gate = steps = Steps(allowed=1)
    async with edge.stream("A", 5) as response:
        texts = frames(response)
        for made in range(1, 6):
            frame = await anext(texts)
            assert isinstance(frame, dict)
            assert frame["response"] == "ABCDEF"[made]
            steps.allow(made + 1)
        assert [frame async for frame in texts][-1] == "[DONE]"


@pytest.mark.parametrize("safe", ["/@", "@", "/", ""])
async def test_a_model_may_be_percent_encoded(edge: EdgeClient, safe: str) -> None:
    url = f"{edge.ai}/run/{quote(MODEL, safe=safe)}"
    answer = await edge.http.post(url, json={"prompt": "A"}, headers=edge.headers())
    assert answer.status_code == 200, answer.text


async def test_json_is_read_whatever_the_content_type(edge: EdgeClient) -> None:
    headers = edge.headers() | {"content-type": "application/x-www-form-urlencoded"}
    answer = await edge.http.post(edge.run_url, content=b'{"prompt": "A"}', headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/nowhere", "/nowhere"),
        ("/client/v4/nowhere", "/client/v4/nowhere"),
        (f"/client/v4/accounts/{ACCOUNT}/ai/v1/audio", "/ai/v1/audio"),
        (f"/client/v4/accounts/{ACCOUNT}/ai/v1/chat/completions/", "completions/"),
        (f"/client/v4/accounts/{ACCOUNT}/ai/runs", "/ai/runs"),
        ("/v1/nothing", "/v1/nothing"),
    ],
)
async def test_an_unknown_address(edge: EdgeClient, path: str, shown: str) -> None:
    answer = await edge.http.post(edge.url + path, headers=edge.headers())
    error = answer.json()["errors"][0]
    assert (answer.status_code, error["code"]) == (404, 7003)
    assert f"{shown}, perhaps your object identifier is invalid?" in error["message"]
    assert ("error" in answer.json()) == ("/v1/" in path)  # OpenAI's object, there


async def test_a_wrong_method(edge: EdgeClient) -> None:
    for url in (edge.run_url, edge.chat_url):
        answer = await edge.http.get(url, headers=edge.headers())
        assert answer.status_code == 405
        assert answer.json()["errors"][0]["code"] == 7001
        assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("given", ["none", "empty", "nonsense", "foreign", "no scheme"])
async def test_the_key_is_looked_at_before_anything_else(
    edge: EdgeClient, region: CountingRegion, tmp_path: Path, given: str
) -> None:
    """A body over the limit, an unknown model: none of it is told to one without a key."""
    foreign = keys.create(tmp_path / "keys", "somebody-else", days=1, now=unix_time())
    headers = {
        "none": {},
        "empty": {"authorization": ""},
        "nonsense": {"authorization": "Bearer nonsense"},
        "foreign": {"authorization": f"Bearer {foreign}"},
        "no scheme": {"authorization": edge.key},
    }[given]
    for url in (edge.run_url, edge.chat_url, f"{edge.ai}/run/@cf/no/such"):
        answer = await edge.http.post(url, content=b"{" * 200_000, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["errors"] == [{"code": 10000, "message": "Authentication error"}]
        assert answer.headers["www-authenticate"] == "Bearer"
    assert region.asked == []


async def test_a_revoked_key(edge: EdgeClient, tmp_path: Path) -> None:
    assert (await edge.raw("A", 1)).status_code == 200
    keys.revoke(tmp_path / "keys", edge.key)
    with anyio.fail_after(10):
        while (await edge.raw("A", 1)).status_code != 401:
            await anyio.sleep(0.01)


async def test_an_unknown_model(edge: EdgeClient) -> None:
    for sent in ({}, {"prompt": "A"}):
        answer = await edge.http.post(
            f"{edge.ai}/run/@cf/no/such", json=sent, headers=edge.headers()
        )
        assert native_error(answer) == (400, 5007, "No such model @cf/no/such or task")
    answer = await edge.chat("hello", model="@cf/no/such")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_a_model_that_no_header_could_name(edge: EdgeClient) -> None:
    """Answers to who asks for several tries say in a header which model was tried."""
    headers = edge.headers() | {"cf-aig-max-attempts": "2"}
    body = {"model": "a\r\nset-cookie: b=c", "messages": [{"role": "user", "content": "A"}]}
    answer = await edge.http.post(edge.chat_url, json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_found")
    assert "set-cookie" not in answer.headers


async def test_bad_input_names_its_field_in_both_dialects(edge: EdgeClient) -> None:
    status, code, message = native_error(await edge.raw("A", temperature=9))
    assert (status, code) == (400, 5006)
    assert "temperature" in message
    error = (await edge.chat("A", temperature=9)).json()["error"]
    assert error["param"] == "temperature"
    for content in (b"", b"{", b"\xff", b"[]", b'{"prompt": 1}'):
        answer = await edge.http.post(edge.run_url, content=content, headers=edge.headers())
        assert native_error(answer)[:2] == (400, 5006)


async def test_a_long_body_is_read_beside_the_streams(tmp_path: Path) -> None:
    """Parsed and encoded in threads, with the same answer and the same complaints."""
    region = CountingRegion(window=300_000)
    async with running(region), edge_over(tmp_path, [region.region]) as edge:
        whole = await edge.raw("A" * 200_000, 2)
        assert whole.json()["result"]["usage"]["prompt_tokens"] == 200_000
        assert native_error(await edge.raw("A" * 200_000, -1))[1] == 5006


async def test_a_prompt_beyond_the_context(edge: EdgeClient, region: CountingRegion) -> None:
    status, code, message = native_error(await edge.raw("A" * 9000))
    assert (status, code) == (400, 5006)
    assert "prompt of 9000 tokens exceeds the context window of 8192 tokens" in message
    assert native_error(await edge.raw("A" * 8192))[1] == 5006
    last = (await edge.raw("A" * 8191, 5)).json()["result"]
    assert last["usage"]["completion_tokens"] == 1
    error = (await edge.chat("A" * 9000)).json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "8192" in error["message"]


@pytest.mark.parametrize("api", ["run", "chat"])
async def test_a_huge_body_is_refused_at_its_stated_length(edge: EdgeClient, api: str) -> None:
    url = edge.run_url if api == "run" else edge.chat_url
    answer = await edge.http.post(url, content=b" " * 100_001, headers=edge.headers())
    assert answer.status_code == 413
    assert answer.json()["errors"][0]["code"] == 3006
    assert "100001 bytes exceeds the limit of 100000 bytes" in answer.text
    assert ("error" in answer.json()) == (api == "chat")


async def test_a_huge_body_without_a_stated_length(edge: EdgeClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    answer = await edge.http.post(edge.run_url, content=chunks(), headers=edge.headers())
    assert native_error(answer)[:2] == (413, 3006)
    assert (await edge.raw("A", 1)).status_code == 200


async def test_a_body_that_stays_away(tmp_path: Path, region: CountingRegion) -> None:
    async with edge_over(tmp_path, [region.region], stalled_reader_s=0.2) as edge:
        async with await edge.connect(b"{", content_length=10) as stream:
            answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":3007' in answer


async def test_every_answer_has_an_id_of_its_own(edge: EdgeClient) -> None:
    answers = [
        await edge.raw("A", 1),
        await edge.chat("A", max_tokens=1),
        await edge.raw("A", -1),
        await edge.http.get(edge.url),
        await edge.http.get(f"{edge.url}/health"),
        await edge.http.post(edge.run_url),
    ]
    async with edge.stream("A", 1) as response:
        await response.aread()
    ids = [answer.headers["x-request-id"] for answer in [*answers, response]]
    assert ids == [answer.headers["cf-ai-req-id"] for answer in [*answers, response]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (Failure(Code.NO_CAPACITY, "full", retry_after_s=7.2), 429, 3040, "8"),
        (Failure(Code.NO_CAPACITY, "full"), 429, 3040, "1"),
        (Failure(Code.UNAVAILABLE, "loading"), 503, 7009, "1"),
        (Failure(Code.TIMEOUT, "late"), 408, 3007, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_the_first_token_is_a_status(
    edge: EdgeClient,
    region: CountingRegion,
    failure: Failure,
    status: int,
    code: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    region.gate = refusing(failure)
    answer = await edge.raw("A", 5, stream=stream)
    assert native_error(answer)[:2] == (status, code)
    assert answer.headers.get("retry-after") == retry_after
    if code == 3040:
        assert native_error(answer)[2] == "Capacity temporarily exceeded, please try again."


async def test_what_fails_later_ends_the_stream_without_done(
    edge: EdgeClient, region: CountingRegion
) -> None:
    region.gate = refusing(Failure(Code.TIMEOUT, "late"), at=3)
    async with edge.stream("A", 9) as response:
        assert response.status_code == 200
        body = (await response.aread()).decode()
    assert '"D"' in body
    assert '"E"' not in body
    assert '"code":3007' in body
    assert "[DONE]" not in body


async def test_a_request_has_its_time(tmp_path: Path, region: CountingRegion) -> None:
    region.gate = steps = Steps()
    async with edge_over(tmp_path, [region.region], budget_s=0.3) as edge:
        answer = await edge.raw("A")
        assert native_error(answer)[:2] == (408, 3007)
        assert region.asked[0].budget_s <= 0.3
        steps.allow(1)
        async with edge.stream("A") as response:
            body = (await response.aread()).decode()
        assert '"code":3007' in body
        assert "[DONE]" not in body
        await region.wait_idle()


async def test_a_bug_is_logged_and_not_told(
    edge: EdgeClient,
    region: CountingRegion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("edge.complete.rank", broken)
    with caplog.at_level(logging.ERROR):
        answer = await edge.raw("A")
    request_id = answer.headers["x-request-id"]
    assert native_error(answer) == (500, 5000, f"internal error, request {request_id}")
    [record] = [r for r in caplog.records if r.name == "edge.door"]
    assert record.fields["request_id"] == request_id  # type: ignore[attr-defined]
    assert record.exc_info is not None


async def test_the_log_has_one_line_a_request(
    edge: EdgeClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="edge.request"):
        answer = await edge.raw("AB", 5, stop=["E"])
        await edge.raw("A", -1)
        await edge.http.get(f"{edge.url}/health")
    good, bad = [record.fields for record in caplog.records if record.name == "edge.request"]  # type: ignore[attr-defined]
    assert good["request_id"] == answer.headers["x-request-id"]
    assert (good["account"], good["model"], good["region"]) == (ACCOUNT, MODEL, "weur")
    assert (good["prompt_tokens"], good["completion_tokens"]) == (2, 3)
    assert good["tries"] == [{"region": "weur", "why": ("430 km", "room 8")}]
    assert good["outcome"] == "ok"
    assert 0 < good["ttft_ms"] <= good["total_ms"]
    assert bad["outcome"] == "bad_input"
    assert "max_tokens" in bad["detail"]


async def test_metrics_count_what_came_of_requests(edge: EdgeClient) -> None:
    await edge.raw("AB", 5)
    await edge.chat("A", max_tokens=2)
    await edge.raw("A", -1)
    await edge.http.post(f"{edge.ai}/run/@cf/no/such", headers=edge.headers())
    await edge.http.get(f"{edge.url}/nowhere")

    async def requests(**labels: str) -> float:
        return await edge.metric("edgefire_edge_requests_total", **labels)

    assert await requests(route="run", model=MODEL, outcome="ok") == 1
    assert await requests(route="chat_completions", model=MODEL, outcome="ok") == 1
    assert await requests(route="run", outcome="bad_input") == 1
    assert await requests(route="run", model="", outcome="unknown_model") == 1
    assert await requests(route="none", outcome="no_route") == 1
    assert await edge.metric("edgefire_edge_tokens_total", kind="completion") == 7
    assert await edge.metric("edgefire_edge_ttft_seconds_count", model=MODEL) == 2
    assert await edge.metric("edgefire_edge_served_total", region="weur") == 2
    assert await edge.metric("edgefire_edge_in_flight") == 0
    assert await edge.metric("edgefire_edge_region_connected", region="weur") == 1
    assert await edge.metric("edgefire_edge_region_breaker_open", region="weur") == 0


async def test_what_operators_ask(edge: EdgeClient) -> None:
    for path in ("health", "ready"):
        assert (await edge.http.get(f"{edge.url}/{path}")).status_code == 200
    for headers in ({}, edge.headers()):
        answer = await edge.http.get(f"{edge.url}/v1/report", headers=headers)
        assert answer.status_code == 401
    answer = await edge.http.get(f"{edge.url}/v1/report", headers=bearer(SECRET))
    report = msgspec.json.decode(answer.content, type=ProcessReport)
    assert (report.role, report.url, report.in_flight, report.ready) == ("edge", edge.url, 0, True)


async def test_many_at_once(edge: EdgeClient, region: CountingRegion) -> None:
    """No stream gets another's tokens."""

    async def one(n: int) -> None:
        prompt = chr(34 + n % 40)
        async with edge.stream(prompt, 20 + n % 15) as response:
            text, usage, done = await read_all(response)
        assert text == "".join(chr(ord(prompt) + 1 + i) for i in range(20 + n % 15))
        assert (usage["completion_tokens"], done) == (20 + n % 15, True)

    async with anyio.create_task_group() as tasks:
        for n in range(100):
            tasks.start_soon(one, n)
    await region.wait_idle()
