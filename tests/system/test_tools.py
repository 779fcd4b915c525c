"""Calls that have to be made, from a client to an engine with random weights and back: such a model
would say anything, so what parses is what the grammar allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.events import frames
from tests.system.faults import nothing_in_flight
from tests.system.test_grammar import real_world
from tests.system.world import MODEL, World

pytestmark = pytest.mark.system
PAINT = {
    "name": "paint",
    "parameters": {
        "type": "object",
        "properties": {
            "color": {"type": "string", "enum": ["red", "green"]},
            "layers": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["color", "layers"],
    },
}
WAIT = {"name": "wait", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": PAINT}, WAIT]
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Go on."}],
    "tools": TOOLS,
    "max_tokens": 2000,
    "temperature": 1.0,
    "seed": 3,
    "parallel_tool_calls": False,
}


def assert_fits(name: str, arguments: dict[str, Any]) -> None:
    if name == "wait":
        assert arguments == {}
        return
    assert name == "paint"
    assert arguments["color"] in {"red", "green"}
    assert arguments["layers"] in range(1, 10)
    assert len(arguments) == 2


async def post(w: World, url: str, **fields: Any) -> Any:
    answer = await w.client.post(url, json=ASK | fields, headers=w.headers())
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(w: World, url: str, **fields: Any) -> list[Any]:
    body = ASK | fields | {"stream": True}
    async with w.client.stream("POST", url, json=body, headers=w.headers()) as response:
        assert response.status_code == 200
        *told, done = [frame async for frame in frames(response)]
    assert done == "[DONE]"
    return told


async def test_what_must_be_called_is_called(tmp_path: Path) -> None:
    async with real_world(tmp_path, "weur") as w:
        native, openai = w.run_url(), w.v1_url()
        for seed in range(4):
            forced = {"tool_choice": "required", "seed": seed}
            result = (await post(w, native, **forced))["result"]
            assert result["finish_reason"] == "tool_calls"
            assert result["response"] == ""
            [call] = result["tool_calls"]
            assert_fits(call["name"], call["arguments"])
            [frame] = [it for it in await streamed(w, native, **forced) if it.get("tool_calls")]
            assert frame["tool_calls"][0]["arguments"] == call["arguments"]

        named = {"model": MODEL, "tool_choice": {"type": "function", "function": {"name": "paint"}}}
        [choice] = (await post(w, openai, **named))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"
        assert_fits("paint", json.loads(call["function"]["arguments"]))
        told = [it["choices"][0]["delta"] for it in await streamed(w, openai, **named)]
        parts = [it["tool_calls"][0]["function"]["arguments"] for it in told if "tool_calls" in it]
        assert "".join(parts) == call["function"]["arguments"]
        assert len(parts) > 5

        several = {"tool_choice": "required", "parallel_tool_calls": True, "max_tokens": 400}
        for call in (await post(w, native, **several))["result"]["tool_calls"]:
            assert_fits(call["name"], call["arguments"])

        broken = {"name": "f", "parameters": {"properties": {"x": {"type": "nope"}}}}
        body = ASK | {"tools": [broken], "tool_choice": "required"}
        answer = await w.client.post(native, json=body, headers=w.headers())
        assert answer.status_code == 400
        assert "'/tools'" in answer.json()["errors"][0]["message"]
        await nothing_in_flight(w)
