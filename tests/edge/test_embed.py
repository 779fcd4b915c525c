"""Embeddings over HTTP, at an edge over fake regions: routes, refusals, failover, counts."""

from __future__ import annotations

import sqlite3
import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import openai
import pytest

from routing import wire
from routing.errors import Code, Failure
from routing.region import Place
from tests.fakes.counting_region import MODEL, OTHER_ASSETS, CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over

VECTORS = "@cf/test/vectors"


def vectors(name: str = "weur", **more: Any) -> CountingRegion:
    return CountingRegion(name, model=VECTORS, task="text-embeddings", window=20, **more)


@pytest.fixture
async def region() -> AsyncIterator[CountingRegion]:
    found = vectors()
    async with running(found):
        yield found


@pytest.fixture
async def edge(tmp_path: Path, region: CountingRegion) -> AsyncIterator[EdgeClient]:
    chat = CountingRegion("enam")
    async with (
        running(chat),
        edge_over(tmp_path, [region.region, chat.region], ledger=tmp_path / "ledger") as client,
    ):
        yield client


async def post(edge: EdgeClient, path: str, body: dict[str, Any]) -> httpx2.Response:
    return await edge.http.post(path, json=body, headers=edge.headers())


async def run(edge: EdgeClient, model: str = VECTORS, **body: Any) -> httpx2.Response:
    return await post(edge, f"{edge.ai}/run/{model}", body)


async def embeddings(edge: EdgeClient, **body: Any) -> httpx2.Response:
    return await post(edge, f"{edge.ai}/v1/embeddings", {"model": VECTORS, **body})


def refused(answer: httpx2.Response) -> str:
    assert answer.status_code == 400, answer.text
    body = answer.json()
    return str(body["errors"][0]["message"] if "errors" in body else body["error"]["message"])


async def test_natively(edge: EdgeClient, region: CountingRegion) -> None:
    answer = await run(edge, text=["AB", "C"])
    assert answer.json()["result"] == {
        "shape": [2, 3],
        "data": [[131, 2, 1], [67, 1, 1]],
        "pooling": "mean",
    }
    assert answer.headers["x-served-by"] == "weur"
    enveloped = await post(
        edge, f"{edge.ai}/run", {"model": VECTORS, "input": {"text": "C", "pooling": "cls"}}
    )
    assert enveloped.json()["result"]["data"] == [[67, 1, 2]]
    assert [it.texts for it in region.embeds] == [((65, 66), (67,)), ((67,),)]


async def test_reranking(edge: EdgeClient) -> None:
    contexts = [{"text": "AB"}, {"text": "A"}, {"text": "ABC"}]
    answer = await run(edge, query="A", contexts=contexts, top_k=2)
    [best, second] = answer.json()["result"]["response"]
    assert (best["id"], second["id"]) == (1, 0)
    assert best["score"] == pytest.approx(1.0)


@pytest.mark.parametrize("v1", ["/v1", "/client/v4/accounts/acme/ai/v1"])
async def test_as_openai_has_it(edge: EdgeClient, v1: str) -> None:
    body = {"model": VECTORS, "input": "AB"}
    answer = (await post(edge, f"{edge.url}{v1}/embeddings", body)).json()
    assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [131, 2, 1]}]
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    packed = await post(
        edge, f"{edge.url}{v1}/embeddings", {**body, "input": [[7]], "encoding_format": "base64"}
    )
    assert struct.unpack("<3f", b64decode(packed.json()["data"][0]["embedding"])) == (7, 1, 1)


async def test_what_a_model_is_not_for(edge: EdgeClient, region: CountingRegion) -> None:
    is_for = f"{VECTORS} is for text-embeddings"
    assert is_for in refused(await run(edge, prompt="A"))
    messages = [{"role": "user", "content": "A"}]
    for route, body in (
        ("chat/completions", {"messages": messages}),
        ("completions", {"prompt": "A"}),
        ("responses", {"input": "A"}),
        ("messages", {"messages": messages, "max_tokens": 5}),
    ):
        answer = await post(edge, f"{edge.ai}/v1/{route}", {"model": VECTORS, **body})
        assert is_for in refused(answer), route
    assert f"{MODEL} is for text-generation" in refused(await run(edge, MODEL, text="A"))
    assert f"{MODEL} is for text-generation" in refused(
        await embeddings(edge, model=MODEL, input="A")
    )
    assert not region.asked


async def test_bad_input_is_named(edge: EdgeClient, region: CountingRegion) -> None:
    too_long = "'/text/1': 21 tokens exceed the 20 that a text may have"
    assert too_long in refused(await run(edge, text=["A", "A" * 21]))
    assert "'/query': 21 tokens" in refused(
        await run(edge, query="A" * 21, contexts=[{"text": "A"}])
    )
    assert "'/input': 21 tokens" in refused(await embeddings(edge, input="A" * 21))
    assert "'/input': 1000 is no token" in refused(await embeddings(edge, input=[1000]))
    assert "'/dimensions'" in refused(await embeddings(edge, input="A", dimensions=2))
    assert len(region.embeds) == 1  # whose vectors had another size


async def test_no_key_and_no_model(edge: EdgeClient) -> None:
    body = {"model": VECTORS, "input": "A"}
    assert (await edge.http.post(f"{edge.url}/v1/embeddings", json=body)).status_code == 401
    unknown = await embeddings(edge, model="@cf/no/such", input="A")
    assert "No such model @cf/no/such" in refused(unknown)


async def test_it_is_counted(edge: EdgeClient, tmp_path: Path) -> None:
    assert (await embeddings(edge, input=["AB", "C"])).status_code == 200
    await edge.wait_metric("edgefire_edge_tokens_total", 3, model=VECTORS, kind="prompt")
    await edge.wait_metric("edgefire_edge_requests_total", 1, route="embeddings", outcome="ok")
    await edge.wait_metric("edgefire_edge_ledger_pending", 0)
    rows = sqlite3.connect(tmp_path / "ledger")
    query = "SELECT model, regions, prompt_tokens, completion_tokens, outcome, whole FROM ledger"
    found = rows.execute(query).fetchall()
    rows.close()
    assert found == [(VECTORS, "weur", 3, 0, "ok", 1)]


async def test_limits_of_the_task_hold(tmp_path: Path, region: CountingRegion) -> None:
    async with edge_over(tmp_path, [region.region], limits="workers-ai") as edge:
        answer = await run(edge, text="A")
        assert answer.status_code == 200
        assert any("ratelimit" in name for name in answer.headers), answer.headers


async def test_another_region_takes_over(tmp_path: Path) -> None:
    near, far = vectors(), vectors("enam", place=Place(39.04, -77.49))

    async def full(_: wire.Embed) -> None:
        raise Failure(Code.NO_CAPACITY, "no room", retry_after_s=1.0)

    calm = far.embed_gate
    regions = [near.region, far.region]
    async with running(near), running(far), edge_over(tmp_path, regions) as edge:
        near.embed_gate = full
        answer = await run(edge, text="A")
        assert (answer.status_code, answer.headers["x-served-by"]) == (200, "enam")
        far.embed_gate = full
        assert (await run(edge, text="A")).status_code == 429
        await near.stop()
        far.embed_gate = calm
        assert (await run(edge, text="A")).headers["x-served-by"] == "enam"


async def test_a_tokenizer_that_changed_costs_a_second_try(tmp_path: Path) -> None:
    region = vectors(reported=OTHER_ASSETS)
    region.assets = OTHER_ASSETS

    async def stale(request: wire.Embed) -> None:
        if len(region.embeds) == 1:
            raise Failure(Code.STALE_TOKENIZER, "other ids")

    region.embed_gate = stale
    async with running(region), edge_over(tmp_path, [region.region]) as edge:
        assert (await run(edge, text="A")).status_code == 200
        assert len(region.embeds) == 2


async def test_hanging_up_reaches_the_region(edge: EdgeClient, region: CountingRegion) -> None:
    async def never(_: wire.Embed) -> None:
        await anyio.sleep_forever()

    region.embed_gate = never
    with anyio.move_on_after(0.5):
        await run(edge, text="A")
    with anyio.fail_after(10):
        while not region.embeds:
            await anyio.sleep(0.005)
    await region.wait_idle()


async def test_a_batch_of_embeddings(tmp_path: Path, region: CountingRegion) -> None:
    body = {"model": VECTORS, "input": ["AB", "C"]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    async with (
        edge_over(tmp_path, [region.region], store=tmp_path / "store.sqlite") as edge,
        openai.AsyncOpenAI(base_url=f"{edge.ai}/v1", api_key=edge.key, max_retries=0) as client,
    ):
        content = msgspec.json.encode(line)
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        with anyio.fail_after(20):
            while batch.status != "completed":
                assert batch.status in {"validating", "in_progress", "finalizing"}
                await anyio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        output = (await client.files.content(batch.output_file_id)).content
        answer = msgspec.json.decode(output)["response"]["body"]
        assert [it["embedding"] for it in answer["data"]] == [[131, 2, 1], [67, 1, 1]]
        assert region.embeds[0].never_waits  # behind all that clients wait for


async def test_queued_natively(tmp_path: Path, region: CountingRegion) -> None:
    async with edge_over(tmp_path, [region.region], store=tmp_path / "store.sqlite") as edge:
        url = f"{edge.ai}/run/{VECTORS}?queueRequest=true"
        wrong = await post(edge, url, {"requests": [{"text": "A"}, {"prompt": "A"}]})
        assert f"{VECTORS} is for text-embeddings" in refused(wrong)
        queued = await post(edge, url, {"requests": [{"text": "A"}, {"text": ["B", "C"]}]})
        asked = {"request_id": queued.json()["result"]["request_id"]}
        with anyio.fail_after(20):
            while "responses" not in (found := (await post(edge, url, asked)).json()["result"]):
                await anyio.sleep(0.02)
        shapes = [it["result"]["shape"] for it in found["responses"]]
        assert shapes == [[1, 3], [2, 3]]
