"""What a client asks of Responses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from edge.responses import parse, recalled
from routing.errors import Failure
from routing.wire import Grammar
from tests.edge.bodies import REFUSALS, anything, nearly_a_request, outcome, refused
from tests.edge.responses import BODY, ask

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "name": "f"}
DEEP = json.loads("[" * 200 + "]" * 200)


class TestAsks:
    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"model": None}, "/model"),
            ({"model": ""}, "/model"),
            ({"input": None}, "/input"),
            ({"input": []}, "/input"),
            ({"input": 7}, "/input"),
            ({"input": ["x"]}, "/input/0"),
            ({"input": [{"role": "robot", "content": "x"}]}, "/input/0/role"),
            ({"input": [{"role": "user"}]}, "/input/0/content"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "/input/0/content/0/type",
            ),
            (
                {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
                "/input/0/content/0/text",
            ),
            ({"input": [{"type": "computer_call"}]}, "/input/0/type"),
            ({"input": [{"type": "function_call", "call_id": "c"}]}, "/input/0/name"),
            ({"input": [{"type": "function_call_output", "output": ""}]}, "/input/0/call_id"),
            ({"input": [{"type": "item_reference"}]}, "/input/0/id"),
            ({"instructions": 7}, "/instructions"),
            ({"previous_response_id": 7}, "/previous_response_id"),
            ({"background": True}, "/background"),
            ({"conversation": "conv_1"}, "/conversation"),
            ({"prompt": {"id": "p"}}, "/prompt"),
            ({"truncation": "some"}, "/truncation"),
            ({"store": "yes"}, "/store"),
            ({"metadata": {"a": 1}}, "/metadata/a"),
            ({"metadata": {"a": "x" * 513}}, "/metadata/a"),
            ({"metadata": {str(n): "" for n in range(17)}}, "/metadata"),
            ({"max_output_tokens": 0}, "/max_output_tokens"),
            ({"temperature": 2.1}, "/temperature"),
            ({"top_p": 1.1}, "/top_p"),
            ({"top_logprobs": 21}, "/top_logprobs"),
            ({"include": 7}, "/include"),
            ({"reasoning": {"effort": 7}}, "/reasoning/effort"),
            ({"text": {"format": {}}}, "/text/format/type"),
            ({"tools": [{"type": "web_search"}]}, "/tools/0/type"),
            ({"text": {"format": {"type": "yaml"}}}, "/text/format/type"),
            ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "/text/format/schema"),
            ({"tool_choice": {"type": "mcp"}}, "/tool_choice/type"),
            ({"tool_choice": {"type": "function"}}, "/tool_choice/name"),
            ({"lora": "x"}, "/lora"),
            ({"tools": [{"type": "function"}]}, "/tools/0/name"),
            # What is repeated in the answer must not be too deep to be written again.
            ({"tools": [TOOL | {"x": DEEP}]}, "/tools"),
            ({"tools": [TOOL], "tool_choice": TOOL | {"x": DEEP}}, "/tool_choice"),
            ({"text": {"format": {"type": "text", "x": DEEP}}}, "/text/format"),
        ],
    )
    def test_a_refusal_names_the_field(self, fields: dict[str, Any], pointer: str) -> None:
        assert refused(parse, BODY | fields).pointer == pointer

    @pytest.mark.parametrize(
        "fields",
        [
            dict.fromkeys(
                [
                    *["instructions", "previous_response_id", "store", "tools", "tool_choice"],
                    *["text", "max_output_tokens", "temperature", "top_p", "include", "metadata"],
                    *["reasoning", "user", "truncation", "background", "stream", "stream_options"],
                ]
            ),
            {"truncation": "auto", "some_new_field": {"a": 1}, "background": False},
            {"text": {"format": {"type": "text"}, "verbosity": "low"}},
            {"stream_options": {"include_obfuscation": False}, "service_tier": "auto"},
            {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}},
        ],
    )
    def test_what_asks_for_nothing_is_accepted(self, fields: dict[str, Any]) -> None:
        asked = ask(**fields)
        assert asked.messages == (USER,)
        assert asked.stored
        assert not asked.refers

    def test_what_rides_along(self) -> None:
        asked = ask(max_output_tokens=7, temperature=0.5, top_p=0.25, stream=True, store=False)
        sampling = asked.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.25)
        assert asked.stream
        assert not asked.stored

    @pytest.mark.parametrize(
        ("fields", "logprobs"),
        [
            ({}, None),
            ({"include": ["message.output_text.logprobs"]}, 0),
            ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
            ({"top_logprobs": 2}, 2),
            ({"top_logprobs": 0}, None),
        ],
    )
    def test_logprobs_say_how_many_beside(
        self, fields: dict[str, Any], logprobs: int | None
    ) -> None:
        assert ask(**fields).sampling.logprobs == logprobs

    @pytest.mark.parametrize(
        ("form", "grammar"),
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, Grammar("json_object", "")),
            (
                {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
                Grammar("json_schema", '{"type":"object"}'),
            ),
        ],
    )
    def test_the_format_is_what_the_answer_must_match(
        self, form: dict[str, Any], grammar: Grammar | None
    ) -> None:
        asked = ask(text={"format": form})
        assert asked.grammar == grammar
        assert asked.repeated["text"] == {"format": form}

    @pytest.mark.parametrize(("mode", "forced"), [("auto", ()), ("required", ("f",))])
    def test_some_of_the_tools_may_be_chosen(self, mode: str, forced: tuple[str, ...]) -> None:
        tools = [{"type": "function", "name": name} for name in "fg"]
        choice = {"type": "allowed_tools", "mode": mode, "tools": tools[:1]}
        asked = ask(tools=tools, tool_choice=choice)
        assert (asked.tools.find("g") is None) == (mode == "auto")
        assert asked.tools.forced == forced
        assert asked.repeated["tool_choice"] == choice
        other = BODY | {"tools": tools[1:], "tool_choice": choice}
        assert refused(parse, other).pointer == "/tool_choice/tools/0/name"

    def test_items_become_the_turns_of_a_template(self) -> None:
        given = [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "hm"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x":1}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "3"}],
            },
            {"role": "assistant", "content": "plain"},
            {"role": "assistant", "content": "again"},
        ]
        assert ask(instructions="i", input=given).messages == (
            {"role": "system", "content": "i\n\nd"},
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "reasoning_content": "hm",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "f", "arguments": {"x": 1}},
                        "id": "c1",
                    },
                    {"type": "function", "function": {"name": "g", "arguments": {}}, "id": "c2"},
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "tool", "content": "3", "tool_call_id": "c2"},
            {"role": "assistant", "content": "plain"},
            {"role": "assistant", "content": "again"},
        )

    def test_earlier_turns_and_references_are_put_in_their_place(self) -> None:
        turn = ask(
            previous_response_id="resp_0",
            instructions="i",
            input=[{"id": "msg_9"}, {"role": "user", "content": "c"}],
        )
        assert turn.refers
        earlier = [{"type": "message", "role": "user", "content": "a"}]
        named = {"type": "message", "role": "assistant", "content": "b"}
        assert recalled(turn, earlier, {"msg_9": named}).messages == (
            {"role": "system", "content": "i"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        )

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(nearly_a_request | anything)
    def test_any_json_is_understood_or_refused(self, body: Any) -> None:
        body = {"input": "x", **body} if isinstance(body, dict) else body
        came = outcome(parse, json.dumps(body).encode())
        if isinstance(came, Failure):
            assert came.code in REFUSALS
        else:
            assert came.messages
            assert came.model
