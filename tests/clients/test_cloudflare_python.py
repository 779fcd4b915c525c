"""Cloudflare's own Python client, with another base URL and token."""

from __future__ import annotations

from collections.abc import AsyncIterator

import cloudflare
import pytest
from cloudflare import AsyncCloudflare

from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT, EdgeClient

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(edge: EdgeClient) -> AsyncIterator[AsyncCloudflare]:
    base = f"{edge.url}/client/v4"
    async with AsyncCloudflare(base_url=base, api_token=edge.key, max_retries=0) as made:
        yield made


async def test_run(client: AsyncCloudflare) -> None:
    answer = await client.ai.run(MODEL, account_id=ACCOUNT, messages=HELLO, max_tokens=4)
    assert isinstance(answer, dict)
    assert answer["response"] == "ABCD"
    assert answer["usage"]["completion_tokens"] == 4


async def test_run_with_what_the_client_has_no_parameter_for(client: AsyncCloudflare) -> None:
    answer = await client.ai.run(
        MODEL, account_id=ACCOUNT, prompt="A", raw=True, extra_body={"stop": "D", "user": "me"}
    )
    assert isinstance(answer, dict)
    assert answer["response"] == "BC"


async def test_run_streamed(client: AsyncCloudflare) -> None:
    """It has no type for streams: its raw response is read line by line."""
    async with client.ai.with_streaming_response.run(
        MODEL, account_id=ACCOUNT, messages=HELLO, max_tokens=3, stream=True
    ) as answer:
        lines = [line async for line in answer.iter_lines() if line]
    assert lines[0].startswith('data: {"response":"A"')
    assert lines[-1] == "data: [DONE]"


async def test_models_are_listed_to_their_end(client: AsyncCloudflare) -> None:
    models = [model async for model in client.ai.models.list(account_id=ACCOUNT)]
    assert [model["name"] for model in models if isinstance(model, dict)] == [MODEL]
    schema = await client.ai.models.schema.get(account_id=ACCOUNT, model=MODEL)
    assert schema is not None
    assert schema.input
    assert schema.output
    tasks = [task async for task in client.ai.tasks.list(account_id=ACCOUNT)]
    assert len(tasks) == 1
    authors = [author async for author in client.ai.authors.list(account_id=ACCOUNT)]
    assert len(authors) == 1


async def test_a_token_is_verified(client: AsyncCloudflare) -> None:
    verified = await client.user.tokens.verify()
    assert verified is not None
    assert verified.status == "active"


async def test_what_is_wrong_is_raised_by_its_name(client: AsyncCloudflare) -> None:
    with pytest.raises(cloudflare.BadRequestError) as bad:
        await client.ai.run(MODEL, account_id=ACCOUNT, messages=HELLO, temperature=9)
    [error] = bad.value.errors
    assert error.code == 5006
    assert "/temperature" in error.message
    with pytest.raises(cloudflare.BadRequestError) as unknown:
        await client.ai.run("@cf/no/model", account_id=ACCOUNT, prompt="A")
    assert unknown.value.errors[0].code == 5007
    with pytest.raises(cloudflare.AuthenticationError) as refused:
        await client.ai.run(MODEL, account_id="another", prompt="A")
    assert refused.value.errors[0].code == 10000
