"""Anthropic's own Python client, with another base URL and key; its types check what it reads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anthropic
import anyio
import pytest

from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, refusing
from tests.fakes.edge_client import NEAR_WEUR, EdgeClient


@pytest.fixture
def edge(edge_of_two: EdgeClient) -> EdgeClient:
    return edge_of_two


@pytest.fixture
async def claude(edge: EdgeClient) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Its base URL has no /v1, and its key goes by x-api-key."""
    async with anthropic.AsyncAnthropic(
        base_url=edge.ai,
        api_key=edge.key,
        max_retries=0,
        default_headers=NEAR_WEUR,
        _strict_response_validation=True,
    ) as client:
        yield client


async def test_whole(claude: anthropic.AsyncAnthropic) -> None:
    message = await claude.messages.create(
        model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "hello"}]
    )
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "ABCD"}]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4
    assert message._request_id == message.id.removeprefix("msg_")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_sequence_is_told(claude: anthropic.AsyncAnthropic, stream: bool) -> None:
    asked = {
        "model": MODEL,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hello"}],
        "stop_sequences": ["EF", "CD"],
    }
    if stream:
        async with claude.messages.stream(**asked) as events:  # type: ignore[arg-type]
            message = await events.get_final_message()
    else:
        message = await claude.messages.create(**asked)  # type: ignore[call-overload]
    assert message.content[0].text == "AB"  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "CD")
    assert message.usage.output_tokens == 4


@pytest.mark.parametrize("burst", [1, 3])
async def test_streamed(
    claude: anthropic.AsyncAnthropic, regions: list[CountingRegion], burst: int
) -> None:
    for region in regions:
        region.burst = burst
    whole = await claude.messages.create(
        model=MODEL,
        max_tokens=40,
        system="Count.",
        messages=[{"role": "user", "content": "hello"}],
    )
    async with claude.messages.stream(
        model=MODEL,
        max_tokens=40,
        system="Count.",
        messages=[{"role": "user", "content": "hello"}],
    ) as stream:
        started = None
        async for event in stream:
            if event.type == "message_start":
                started = event.message.usage.input_tokens
        message = await stream.get_final_message()
    assert message.content[0].to_dict()["text"] == whole.content[0].to_dict()["text"]
    assert message.usage == whole.usage
    assert started == whole.usage.input_tokens


async def test_tokens_are_counted_ahead(
    claude: anthropic.AsyncAnthropic, regions: list[CountingRegion]
) -> None:
    hello: anthropic.types.MessageParam = {"role": "user", "content": "hello"}
    counted = await claude.messages.count_tokens(model=MODEL, system="Count.", messages=[hello])
    assert not regions[0].asked
    told = await claude.messages.create(
        model=MODEL, system="Count.", messages=[hello], max_tokens=1
    )
    assert counted.input_tokens == told.usage.input_tokens
    with pytest.raises(anthropic.BadRequestError):
        await claude.messages.count_tokens(model="@cf/no/such", messages=[hello])
    with pytest.raises(anthropic.BadRequestError):
        await claude.messages.count_tokens(model=MODEL, messages=[])


async def test_both_kinds_of_key_are_taken(edge: EdgeClient) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=edge.ai, auth_token=edge.key, api_key=None, max_retries=0
    ) as client:
        message = await client.messages.create(
            model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "hello"}]
        )
    assert message.stop_reason == "max_tokens"


async def test_errors(
    claude: anthropic.AsyncAnthropic, edge: EdgeClient, regions: list[CountingRegion]
) -> None:
    hello: anthropic.types.MessageParam = {"role": "user", "content": "hello"}
    with pytest.raises(anthropic.BadRequestError) as bad:
        await claude.messages.create(
            model=MODEL, max_tokens=4, messages=[hello], extra_body={"temperature": 2}
        )
    assert "temperature" in bad.value.message
    with pytest.raises(anthropic.BadRequestError) as unknown:
        await claude.messages.create(model="@cf/no/such", max_tokens=4, messages=[hello])
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    for region in regions:
        region.gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    with pytest.raises(anthropic.RateLimitError):
        await claude.messages.create(model=MODEL, max_tokens=4, messages=[hello])
    async with anthropic.AsyncAnthropic(
        base_url=edge.ai, api_key="nonsense", max_retries=0
    ) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await stranger.messages.create(model=MODEL, max_tokens=4, messages=[hello])
    assert refused.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "Authentication error"},
    }


async def test_a_region_that_dies_repeats_nothing(
    claude: anthropic.AsyncAnthropic, regions: list[CountingRegion]
) -> None:
    regions[0].gate = refusing(Failure(Code.LOST, "gone"), times=1, at=3)
    async with claude.messages.stream(
        model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "hello"}]
    ) as stream:
        text = "".join([text async for text in stream.text_stream])
    assert text == "ABCDEF"
    assert len(regions[1].asked) == 1


async def test_a_stream_that_breaks_raises(
    claude: anthropic.AsyncAnthropic, regions: list[CountingRegion]
) -> None:
    for region in regions:
        region.gate = refusing(Failure(Code.LOST, "gone"), at=2)
    texts: list[str] = []

    async def read() -> None:
        async with claude.messages.stream(
            model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "hello"}]
        ) as stream:
            async for text in stream.text_stream:
                texts.append(text)  # noqa: PERF401  what came before it broke counts

    with pytest.raises(anthropic.APIStatusError):
        await read()
    assert "".join(texts) == "AB"


async def test_hanging_up_cancels(
    claude: anthropic.AsyncAnthropic, regions: list[CountingRegion]
) -> None:
    regions[0].gate = Steps(allowed=2)
    with anyio.fail_after(20):
        async with claude.messages.stream(
            model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "hello"}]
        ) as stream:
            async for _ in stream.text_stream:
                break
    await regions[0].wait_idle()


async def test_the_bare_form(edge: EdgeClient) -> None:
    hello: anthropic.types.MessageParam = {"role": "user", "content": "hello"}
    async with anthropic.AsyncAnthropic(
        base_url=edge.url, api_key=edge.key, max_retries=0
    ) as client:
        told = await client.messages.create(model=MODEL, max_tokens=2, messages=[hello])
        assert told.usage.output_tokens == 2
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(model=MODEL, max_tokens=0, messages=[hello])
        assert refused.value.body["type"] == "error"  # type: ignore[index]
