"""OpenAI's own Python client and its Responses; its types check what it reads."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import anyio
import openai
import pytest
from openai.types.responses import Response

from edge import keys
from edge.app import unix_time
from edge.store import AWAY_S
from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, refusing
from tests.fakes.edge_client import NEAR_WEUR, EdgeClient, edge_over


@pytest.fixture
def edge(edge_of_two: EdgeClient) -> EdgeClient:
    return edge_of_two


@pytest.fixture
async def ai(edge: EdgeClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{edge.ai}/v1",
        api_key=edge.key,
        max_retries=0,
        default_headers=NEAR_WEUR,
        _strict_response_validation=True,
    ) as client:
        yield client


def last_prompt(region: CountingRegion) -> str:
    """What the region was last asked to go on with; an id of 256 or more is special."""
    return "".join(map(chr, (one for one in region.asked[-1].token_ids if one < 256)))


async def test_whole(ai: openai.AsyncOpenAI) -> None:
    answer = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    assert answer.output_text == "ABCD"
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage
    assert answer.usage.output_tokens == 4


@pytest.mark.parametrize("burst", [1, 3])
async def test_streamed(ai: openai.AsyncOpenAI, regions: list[CountingRegion], burst: int) -> None:
    for region in regions:
        region.burst = burst
    text, numbers, last = "", [], None
    stream = await ai.responses.create(
        model=MODEL, input="hello", max_output_tokens=40, stream=True
    )
    async for event in stream:
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert numbers == list(range(len(numbers)))
    assert text == "".join(chr(ord("A") + n) for n in range(40))
    assert last
    assert last.type == "response.incomplete"
    assert last.response.output_text == text


async def test_its_stream_helper(ai: openai.AsyncOpenAI) -> None:
    async with ai.responses.stream(
        model=MODEL, input="hello", instructions="Count.", max_output_tokens=5
    ) as stream:
        kinds = [event.type async for event in stream]
        assert "response.output_text.done" in kinds


async def test_a_conversation_goes_on(
    ai: openai.AsyncOpenAI, regions: list[CountingRegion]
) -> None:
    first = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=2)
    second = await ai.responses.create(
        model=MODEL, input="more", previous_response_id=first.id, max_output_tokens=2
    )
    asked = last_prompt(regions[0])
    marks = [" hello", " AB", " more"]
    assert [asked.index(mark) for mark in marks] == sorted(asked.index(m) for m in marks)
    third = await ai.responses.create(
        model=MODEL, input="third", previous_response_id=second.id, max_output_tokens=2
    )
    assert third.previous_response_id == second.id
    asked = last_prompt(regions[0])
    assert asked.count(" AB") == 2


async def test_items_are_referred_to(ai: openai.AsyncOpenAI, regions: list[CountingRegion]) -> None:
    first = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=2)
    await ai.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "hello"},
            {"type": "item_reference", "id": first.output[0].id or ""},
            {"role": "user", "content": "more"},
        ],
        max_output_tokens=2,
    )
    asked = last_prompt(regions[0])
    assert asked.index(" hello") < asked.index(" AB") < asked.index(" more")


async def test_what_was_stored_is_had_back_and_deleted(ai: openai.AsyncOpenAI) -> None:
    told = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=2)
    assert (await ai.responses.retrieve(told.id)).to_dict() == told.to_dict()
    [item] = [one async for one in ai.responses.input_items.list(told.id)]
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "hello"}]
    await ai.responses.delete(told.id)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(told.id)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.delete(told.id)


async def test_input_items_are_paged(ai: openai.AsyncOpenAI) -> None:
    given = [{"role": "user", "content": f"m{n}"} for n in range(7)]
    told = await ai.responses.create(model=MODEL, input=given, max_output_tokens=1)  # type: ignore[arg-type]
    for order, wanted in (("asc", range(7)), ("desc", range(6, -1, -1))):
        pages = ai.responses.input_items.list(told.id, limit=3, order=order)  # type: ignore[arg-type]
        texts = [one.to_dict()["content"][0]["text"] async for one in pages]  # type: ignore[index]
        assert texts == [f"m{n}" for n in wanted]
    for query in ({"limit": 0}, {"limit": "9" * 5000}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            await ai.responses.input_items.list(told.id, extra_query=query)


async def test_what_is_not_to_be_stored_is_not(ai: openai.AsyncOpenAI) -> None:
    told = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=2, store=False)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(told.id)
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.responses.create(model=MODEL, input="x", previous_response_id=told.id)
    assert refused.value.param == "previous_response_id"
    assert told.output[0].id
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.responses.create(
            model=MODEL, input=[{"type": "item_reference", "id": told.output[0].id}]
        )
    assert refused.value.param == "input.0.id"


async def test_another_account_does_not_see_it(
    ai: openai.AsyncOpenAI, edge: EdgeClient, tmp_path: Path
) -> None:
    told = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=2)
    key = keys.create(tmp_path / "keys", "other", days=1, now=unix_time())
    base_url = f"{edge.ai}/v1".replace("/acme/", "/other/")
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as other:
        for asked in (other.responses.retrieve, other.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await asked(told.id)
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(model=MODEL, input="x", previous_response_id=told.id)
    async with openai.AsyncOpenAI(base_url=f"{edge.ai}/v1", api_key=key, max_retries=0) as foreign:
        with pytest.raises(openai.AuthenticationError):
            await foreign.responses.retrieve(told.id)


async def test_two_edges_share_what_is_stored(
    tmp_path: Path, regions: list[CountingRegion]
) -> None:
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(2):
            edge = await stack.enter_async_context(
                edge_over(
                    tmp_path,
                    [regions[0].region],
                    store=tmp_path / "store.sqlite",
                )
            )
            client = openai.AsyncOpenAI(base_url=f"{edge.ai}/v1", api_key=edge.key)
            clients.append(await stack.enter_async_context(client))
        last: Response | None = None
        for turn in range(6):
            last = await clients[turn % 2].responses.create(
                model=MODEL,
                input=f"turn {turn}",
                max_output_tokens=1,
                previous_response_id=last.id if last else None,
            )
        asked = last_prompt(regions[0])
        assert [asked.count(f"turn {turn}") for turn in range(6)] == [1] * 6


async def test_a_store_that_is_away_costs_no_answer(
    tmp_path: Path, regions: list[CountingRegion]
) -> None:
    """Only what goes back to it is refused, and may be tried again."""
    path = tmp_path / "store.sqlite"
    async with (
        edge_over(tmp_path, [regions[0].region], store=path) as edge,
        openai.AsyncOpenAI(base_url=f"{edge.ai}/v1", api_key=edge.key, max_retries=0) as client,
    ):
        first = await client.responses.create(model=MODEL, input="hello", max_output_tokens=2)
        with closing(sqlite3.connect(path)) as db:
            db.execute("ALTER TABLE responses RENAME TO elsewhere")
        second = await client.responses.create(model=MODEL, input="hello", max_output_tokens=2)
        assert second.output_text == "AB"
        with pytest.raises(openai.InternalServerError) as away:
            await client.responses.retrieve(first.id)
        assert away.value.status_code == 503
        with closing(sqlite3.connect(path)) as db:
            db.execute("ALTER TABLE elsewhere RENAME TO responses")
        await anyio.sleep(1.1 * AWAY_S)
        assert (await client.responses.retrieve(first.id)).output_text == "AB"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)


async def test_bad_input_and_unknown_models(ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.responses.create(model=MODEL, input="x", temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.responses.create(model="@cf/no/such", input="x")
    assert refused.value.code == "model_not_found"


async def test_a_region_that_dies_repeats_nothing(
    ai: openai.AsyncOpenAI, regions: list[CountingRegion]
) -> None:
    regions[0].gate = refusing(Failure(Code.LOST, "gone"), times=1, at=3)
    texts, kinds = [], []
    async for event in await ai.responses.create(
        model=MODEL, input="hello", max_output_tokens=6, stream=True
    ):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
    assert "".join(texts) == "ABCDEF"
    assert kinds.count("response.created") == 1
    assert kinds.count("response.output_item.added") == 1
    assert len(regions[1].asked) == 1


async def test_a_stream_that_breaks_says_so(
    ai: openai.AsyncOpenAI, regions: list[CountingRegion]
) -> None:
    for region in regions:
        region.gate = refusing(Failure(Code.LOST, "gone"), at=2)
    stream = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=6, stream=True)
    told = [event async for event in stream]
    deltas = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "AB"
    error, failed = told[-2:]
    assert error.type == "error"
    assert error.code == "lost"
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"


async def test_tokens_are_counted_ahead(ai: openai.AsyncOpenAI) -> None:
    told = await ai.responses.create(
        model=MODEL, input="hello", instructions="Count.", max_output_tokens=2
    )
    counted = await ai.responses.input_tokens.count(
        model=MODEL, input="hello", instructions="Count."
    )
    assert told.usage
    assert counted.input_tokens == told.usage.input_tokens
    more = await ai.responses.input_tokens.count(
        model=MODEL, input="hello", previous_response_id=told.id
    )
    assert more.input_tokens > counted.input_tokens


async def test_hanging_up_cancels(ai: openai.AsyncOpenAI, regions: list[CountingRegion]) -> None:
    regions[0].gate = Steps(allowed=2)
    stream = await ai.responses.create(model=MODEL, input="hello", max_output_tokens=9, stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await regions[0].wait_idle()


async def test_the_bare_form(edge: EdgeClient) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0
    ) as client:
        told = await client.responses.create(model=MODEL, input="hello", max_output_tokens=2)
        assert (await client.responses.retrieve(told.id)).output_text == "AB"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_0")
