"""OpenAI's own Python client, with another base URL and key."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import EdgeClient

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(params=["of an account", "bare"])
async def client(edge: EdgeClient, request: pytest.FixtureRequest) -> AsyncIterator[AsyncOpenAI]:
    base = f"{edge.ai}/v1" if request.param == "of an account" else f"{edge.url}/v1"
    async with AsyncOpenAI(base_url=base, api_key=edge.key, max_retries=0) as made:
        yield made


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=4, temperature=0, seed=1
    )
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("ABCD", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer._request_id


async def test_chat_streamed(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "ABCD"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


async def test_several_choices_with_log_probabilities(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert [entry.token for entry in choice.logprobs.content or ()] == ["A", "B"]


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["A", "K"], max_tokens=3, n=2)
    assert [choice.text for choice in answer.choices] == ["BCD", "BCD", "LMN", "LMN"]
    stream = await client.completions.create(
        model=MODEL, prompt="A", max_tokens=3, stream=True, echo=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "ABCD"


async def test_stop_strings(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=9, stop=["E"]
    )
    assert answer.choices[0].message.content == "ABCD"
    assert answer.choices[0].finish_reason == "stop"


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_what_is_wrong_is_raised_by_its_name(client: AsyncOpenAI, edge: EdgeClient) -> None:
    with pytest.raises(openai.BadRequestError, match="/temperature") as bad:
        await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.chat.completions.create(model="@cf/no/model", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    async with AsyncOpenAI(base_url=client.base_url, api_key="nobody", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            await other.models.list()
    with pytest.raises(openai.NotFoundError):
        await client.fine_tuning.jobs.list()
