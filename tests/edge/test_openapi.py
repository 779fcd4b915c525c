"""The OpenAPI document against an edge: whatever it allows is answered as it says, and what it does
not allow is refused as it says. Schemathesis makes the requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest
import schemathesis
from anyio import to_thread
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from edge.openapi import document
from tests.fakes.counting_region import MODEL, CountingRegion, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over

EXAMPLES = 15
VECTORS = "@cf/test/vectors"
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPERATIONS = [(path, method) for path, methods in document()["paths"].items() for method in methods]


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[EdgeClient]:
    text = CountingRegion(window=64)  # answers end soon, however many tokens are asked for
    vectors = CountingRegion("enam", model=VECTORS, task="text-embeddings")
    kept = {"ledger": tmp_path / "usage" / "ledger.sqlite", "store": tmp_path / "store.sqlite"}
    regions = [text.region, vectors.region]
    async with running(text), running(vectors), edge_over(tmp_path, regions, **kept) as client:
        yield client


async def stored(edge: EdgeClient) -> dict[str, str]:
    """What paths name: a response, a file, a batch, a row of the logs."""

    async def posted(path: str, **body: Any) -> httpx2.Response:
        answer = await edge.http.post(f"{edge.ai}/v1/{path}", headers=edge.headers(), **body)
        assert answer.status_code == 200, answer.text
        return answer

    turn = {"model": MODEL, "input": "hello", "max_output_tokens": 1}
    response = await posted("responses", json=turn)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": turn}
    form: dict[str, Any] = {"file": ("in.jsonl", msgspec.json.encode(line))}
    file = await posted("files", files=form, data={"purpose": "batch"})
    about = {"endpoint": "/v1/responses", "completion_window": "24h"}
    batch = await posted("batches", json={"input_file_id": file.json()["id"], **about})
    log = response.headers["x-request-id"]
    with anyio.fail_after(10):  # rows are written behind their requests
        while (await edge.http.get(f"{edge.ai}/logs/{log}", headers=edge.headers())).is_error:
            await anyio.sleep(0.05)
    ids = {name: it.json()["id"] for name, it in (("file", file), ("batch", batch))}
    return ids | {"log": log, "response_id": response.json()["id"]}


def named(model: str, **more: str) -> dict[str, Any]:
    """The document, with the account and the model that there are wherever it has any text."""
    there = {"account_id": ACCOUNT, "model": model, **more}
    there["input_file_id"] = there["file"]
    there["cf-aig-metadata"] = '{"who": "me"}'  # what is in its JSON, no schema of a text can say
    spec = document()
    for methods in spec["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                known = there.get(parameter["name"])
                if known is not None:
                    parameter["schema"] = {"const": known}
            body = operation.get("requestBody")
            if body is not None:
                [content] = body["content"].values()
                schema = content["schema"]
                for name in {"model", "input_file_id"} & schema.get("properties", {}).keys():
                    schema["properties"][name] = {"const": there[name]}
                _of_the_model_here(schema)
    return spec


def _of_the_model_here(schema: dict[str, Any]) -> None:
    """Natively: what makes text. Embedding models take something else."""
    if "oneOf" in schema:
        schema["oneOf"] = schema["oneOf"][:1]
    inner = schema.get("properties", {}).get("input", {})
    if "oneOf" in inner:
        inner["oneOf"] = inner["oneOf"][:1]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
async def test_an_edge_is_as_it_says(
    edge: EdgeClient, path: str, method: str, mode: GenerationMode
) -> None:
    model = VECTORS if path.endswith("/embeddings") else MODEL
    spec = named(model, **await stored(edge))
    operation = schemathesis.openapi.from_dict(spec)[path][method.upper()]
    statuses: list[int] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # to shrink takes minutes
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(base_url=edge.url, headers=edge.headers(), timeout=120)
        statuses.append(answer.status_code)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKS)

    await to_thread.run_sync(ask)
    if mode is GenerationMode.POSITIVE:
        ended = {409} if path.endswith("/cancel") else set()  # the batch was faster
        assert ({200} | ended) & set(statuses)
