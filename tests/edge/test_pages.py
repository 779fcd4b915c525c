"""What there is to ask, over HTTP: models, schemas, tasks, keys; and several choices at once."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from edge import keys
from edge.app import unix_time
from tests.fakes.counting_region import MODEL, CountingRegion
from tests.fakes.edge_client import ACCOUNT, EdgeClient
from tests.fakes.events import frames


@pytest.fixture
def edge_settings(tmp_path: Path) -> dict[str, Any]:
    return {"ledger": tmp_path / "ledger.sqlite"}


async def got(edge: EdgeClient, path: str, status: int = 200) -> Any:
    answer = await edge.http.get(edge.url + path, headers=edge.headers())
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


AI = f"/client/v4/accounts/{ACCOUNT}/ai"


async def posted(edge: EdgeClient, path: str, **body: Any) -> httpx2.Response:
    return await edge.http.post(edge.url + path, json=body, headers=edge.headers())


class TestModels:
    async def test_what_is_served_is_found(self, edge: EdgeClient) -> None:
        page = await got(edge, f"{AI}/models/search?search=COUNT&task=text%20generation")
        [model] = page["result"]
        assert (model["name"], model["task"]["name"]) == (MODEL, "Text Generation")
        properties = {it["property_id"]: it["value"] for it in model["properties"]}
        assert properties["regions"] == "weur"
        assert int(properties["context_window"]) > 0
        info = page["result_info"]
        assert (info["total_count"], info["total_pages"], info["per_page"]) == (1, 1, 50)

    @pytest.mark.parametrize(
        "query", ["search=nothing", "author=nobody", "task=text-embeddings", "page=2"]
    )
    async def test_a_page_without_any_is_empty(self, edge: EdgeClient, query: str) -> None:
        """Clients ask for page after page until one is."""
        assert (await got(edge, f"{AI}/models/search?{query}"))["result"] == []

    @pytest.mark.parametrize("query", ["page=0", "page=x", "per_page=101", "page=²"])
    async def test_a_page_that_is_none(self, edge: EdgeClient, query: str) -> None:
        said = await got(edge, f"{AI}/models/search?{query}", 400)
        assert said["errors"][0]["code"] == 5006
        assert query.split("=")[0] in said["errors"][0]["message"]

    async def test_schemas_have_the_ranges_that_are_checked(self, edge: EdgeClient) -> None:
        schemas = (await got(edge, f"{AI}/models/schema?model={MODEL}"))["result"]
        prompt = schemas["input"]["oneOf"][0]
        [temperature, _] = prompt["properties"]["temperature"]["anyOf"]
        assert (temperature["minimum"], temperature["maximum"]) == (0, 5)
        answer = await edge.raw("A", temperature=5.1)
        assert answer.status_code == 400
        assert (await got(edge, f"{AI}/models/schema?model=none", 400))["errors"][0]["code"] == 5007
        await got(edge, f"{AI}/models/schema", 400)

    async def test_tasks_and_authors(self, edge: EdgeClient) -> None:
        [task] = (await got(edge, f"{AI}/tasks/search"))["result"]
        assert task["name"] == "Text Generation"
        [author] = (await got(edge, f"{AI}/authors/search"))["result"]
        assert author["name"] == MODEL.split("/")[1]

    @pytest.mark.parametrize("v1", [f"{AI}/v1", "/v1"])
    async def test_openais_list(self, edge: EdgeClient, v1: str) -> None:
        listed = await got(edge, f"{v1}/models")
        assert [it["id"] for it in listed["data"]] == [MODEL]
        assert (await got(edge, f"{v1}/models/{MODEL.replace('/', '%2F')}"))["id"] == MODEL
        error = (await got(edge, f"{v1}/models/@cf/no/model", 400))["error"]
        assert error["code"] == "model_not_found"

    async def test_a_key_is_needed(self, edge: EdgeClient) -> None:
        for path in (f"{AI}/models/search", "/v1/models", "/client/v4/user/tokens/verify"):
            answer = await edge.http.get(edge.url + path)
            assert answer.status_code == 401
        other = f"{AI.replace(ACCOUNT, 'another')}/models/search"
        await got(edge, other, 401)

    async def test_a_good_key_is_told_so(self, edge: EdgeClient) -> None:
        said = await got(edge, "/client/v4/user/tokens/verify")
        assert said["result"]["status"] == "active"


class TestAddresses:
    async def test_the_model_may_be_in_the_body(self, edge: EdgeClient) -> None:
        taken = {"prompt": "AB", "raw": True, "max_tokens": 3}
        answer = await posted(edge, f"{AI}/run", model=MODEL, input=taken)
        assert answer.json()["result"]["response"] == "CDE"
        for body in ({"input": taken}, {"model": MODEL}, {"model": "", "input": taken}):
            assert (await posted(edge, f"{AI}/run", **body)).status_code == 400

    async def test_openais_clients_need_no_account(self, edge: EdgeClient) -> None:
        turns = [{"role": "user", "content": "x"}]
        answer = await posted(
            edge, "/v1/chat/completions", model=MODEL, messages=turns, max_tokens=3
        )
        assert answer.json()["choices"][0]["message"]["content"] == "ABC"

    async def test_an_account_that_the_key_is_not_for(
        self, edge: EdgeClient, tmp_path: Path
    ) -> None:
        key = keys.create(tmp_path / "keys", "another", days=1, now=unix_time())
        headers = {"authorization": f"Bearer {key}"}
        body = {"model": MODEL, "prompt": "A", "max_tokens": 2}
        own = await edge.http.post(f"{edge.url}/v1/completions", json=body, headers=headers)
        assert own.status_code == 200
        url = f"{edge.ai}/v1/completions"
        assert (await edge.http.post(url, json=body, headers=headers)).status_code == 401


class TestAdapters:
    async def test_there_are_none(self, edge: EdgeClient) -> None:
        """By Workers AI's own code and status."""
        answer = await edge.raw("A", lora="mine")
        assert answer.status_code == 405
        [error] = answer.json()["errors"]
        assert error["code"] == 5005
        assert "'/lora'" in error["message"]


class TestSeveral:
    async def test_prompts_and_choices_in_one_answer(self, edge: EdgeClient) -> None:
        answer = await posted(
            edge, "/v1/completions", model=MODEL, prompt=["A", "KL"], n=2, max_tokens=3
        )
        body = answer.json()
        texts = [(it["index"], it["text"]) for it in body["choices"]]
        assert texts == [(0, "BCD"), (1, "BCD"), (2, "MNO"), (3, "MNO")]
        used = body["usage"]
        assert (used["prompt_tokens"], used["completion_tokens"]) == (3, 12)

    async def test_token_ids(self, edge: EdgeClient) -> None:
        body = {"model": MODEL, "prompt": [65, 66], "max_tokens": 2}
        answer = await posted(edge, "/v1/completions", **body)
        assert answer.json()["choices"][0]["text"] == "CD"
        answer = await posted(edge, "/v1/completions", **body | {"prompt": [65, 10**6]})
        assert answer.status_code == 400
        assert "1000000 is no token" in answer.json()["error"]["message"]

    async def test_streamed_choices_are_told_apart(self, edge: EdgeClient) -> None:
        turns = [{"role": "user", "content": "x"}]
        body = {"model": MODEL, "messages": turns, "n": 20, "max_tokens": 4, "stream": True}
        body["stream_options"] = {"include_usage": True}
        texts, reasons = dict.fromkeys(range(20), ""), list[int]()
        async with edge.http.stream(
            "POST", edge.chat_url, json=body, headers=edge.headers()
        ) as answer:
            assert answer.headers["x-served-by"] == "weur"
            *chunks, used, done = [frame async for frame in frames(answer)]
        for chunk in chunks:
            assert isinstance(chunk, dict)
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons += [choice["index"]] if choice["finish_reason"] else []
        assert texts == dict.fromkeys(range(20), "ABCD")
        assert sorted(reasons) == list(range(20))
        assert isinstance(used, dict)
        assert used["usage"]["completion_tokens"] == 80
        assert done == "[DONE]"

    async def test_each_choice_has_a_row_of_usage(self, edge: EdgeClient, tmp_path: Path) -> None:
        answer = await edge.chat("x", n=3, max_tokens=2)
        used = answer.json()["usage"]
        name = answer.headers["x-request-id"]
        rows = await written(tmp_path / "ledger.sqlite", 3)
        assert sorted(rows) == [name, f"{name}-1", f"{name}-2"]
        assert sum(row[0] for row in rows.values()) == used["prompt_tokens"]
        assert sum(row[1] for row in rows.values()) == used["completion_tokens"] == 6

    async def test_one_that_fails_fails_all(self, edge: EdgeClient, region: CountingRegion) -> None:
        answer = await edge.chat("x", n=2, max_tokens=2, logit_bias={"99999": 1})
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/json"


async def written(path: Path, count: int) -> dict[str, tuple[int, int]]:
    """Prompt and completion tokens by request id, once there are so many rows."""
    with anyio.fail_after(10):
        while True:
            with sqlite3.connect(path) as db:
                rows = db.execute(
                    "select request_id, prompt_tokens, completion_tokens from ledger"
                ).fetchall()
            if len(rows) >= count:
                return {name: (prompt, made) for name, prompt, made in rows}
            await anyio.sleep(0.01)


class TestDocument:
    async def test_it_is_there_for_all(self, edge: EdgeClient) -> None:
        answer = await edge.http.get(f"{edge.url}/openapi.json")
        document = msgspec.json.decode(answer.content)
        assert document["openapi"] == "3.1.0"
        assert "/v1/completions" in document["paths"]
        assert set(document["paths"]["/v1/responses/{response_id}"]) == {"get", "delete"}
        body = document["paths"]["/v1/messages"]["post"]["requestBody"]["content"]
        schema = body["application/json"]["schema"]
        assert schema["required"] == ["model", "max_tokens", "messages"]
        assert json.dumps(document)
