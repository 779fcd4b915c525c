"""Calls of tools as people's own clients read them: the region says what a model would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from openai import AsyncOpenAI

from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import EdgeClient
from tests.fakes.saying_region import SayingRegion, ids_of
from tests.fakes.tool_answers import NOW, WEATHER

HELLO: Any = [{"role": "user", "content": "Weather?"}]
FUNCTIONS: list[Any] = [
    {"name": tool.name, "description": tool.description or "-", "parameters": tool.parameters}
    for tool in (WEATHER, NOW)
]
TOOLS: list[Any] = [{"type": "function", "function": one} for one in FUNCTIONS]
CALLED = [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]


@pytest.fixture
async def client(saying_edge: EdgeClient) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{saying_edge.ai}/v1", api_key=saying_edge.key, max_retries=0
    ) as made:
        yield made


class TestOpenAI:
    async def test_whole(self, client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Well. "
        assert choice.message.model_extra == {"reasoning_content": "Paris, then."}
        used: Any = answer.usage
        assert (
            used.completion_tokens_details.reasoning_tokens
            == len("<think>\nParis, then.\n</think>") - 6
        )
        calls: Any = choice.message.tool_calls
        assert [
            (call.function.name, json.loads(call.function.arguments)) for call in calls
        ] == CALLED

    async def test_streamed_by_its_own_helper(self, client: AsyncOpenAI) -> None:
        async with client.chat.completions.stream(
            model=MODEL, messages=HELLO, tools=TOOLS
        ) as stream:
            done = [event async for event in stream]
        calls = [event for event in done if event.type == "tool_calls.function.arguments.done"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLED
        [end] = [event for event in done if event.type == "content.done"]
        assert end.content == "Well. "

    async def test_a_second_turn(self, client: AsyncOpenAI, saying: SayingRegion) -> None:
        first = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
        turn: Any = first.choices[0].message
        results: list[Any] = [
            {"role": "tool", "tool_call_id": call.id, "content": "9"} for call in turn.tool_calls
        ]
        saying.says = ids_of("It is 9.")
        second = await client.chat.completions.create(
            model=MODEL, messages=[*HELLO, turn, *results], tools=TOOLS
        )
        assert second.choices[0].message.content == "It is 9."
        assert second.choices[0].message.tool_calls is None
        prompt = bytes(at for at in saying.asked[-1].token_ids if at < 256).decode()
        assert '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}' in prompt
        assert "<think>\nParis, then.\n</think>" in prompt

    async def test_responses(self, client: AsyncOpenAI) -> None:
        tools: Any = [{"type": "function", "strict": False, **one} for one in FUNCTIONS]
        answer = await client.responses.create(model=MODEL, input="Weather?", tools=tools)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLED
        assert answer.output_text == "Well. "
        assert answer.usage is not None
        assert answer.usage.output_tokens_details.reasoning_tokens > 0
        async with client.responses.stream(model=MODEL, input="Weather?", tools=tools) as stream:
            done = [event async for event in stream]
        told = [event for event in done if event.type == "response.function_call_arguments.done"]
        assert [json.loads(event.arguments) for event in told] == [given for _, given in CALLED]


async def test_anthropic(saying_edge: EdgeClient) -> None:
    tools: Any = [{"name": tool.name, "input_schema": tool.parameters} for tool in (WEATHER, NOW)]
    async with anthropic.AsyncAnthropic(
        base_url=f"{saying_edge.ai}", api_key=saying_edge.key, max_retries=0
    ) as client:
        about: Any = {"model": MODEL, "max_tokens": 500, "messages": HELLO, "tools": tools}
        whole = await client.messages.create(**about)
        async with client.messages.stream(**about) as stream:
            streamed = await stream.get_final_message()
    for answer in (whole, streamed):
        assert answer.stop_reason == "tool_use"
        kinds = [block.type for block in answer.content]
        assert kinds == ["thinking", "text", "tool_use", "tool_use"]
        calls: Any = answer.content[2:]
        assert [(call.name, call.input) for call in calls] == CALLED
