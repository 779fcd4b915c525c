"""Anthropic's Messages, from bodies to exact bytes, and by the types of its official client."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from hypothesis import given, settings
from pydantic import TypeAdapter

from edge.anthropic import error, parse, parse_count
from edge.anthropic_answer import Answer
from edge.ask import (
    Ask,
    Broke,
    End,
    Piece,
    Reasoning,
    Text,
    ToolArguments,
    ToolEnd,
    ToolStart,
    Usage,
)
from routing.errors import Code, Failure
from routing.wire import Grammar
from tests.edge.bodies import HELLO, REFUSALS, anything, nearly_a_request, outcome, refused
from tests.edge.streams import cuts, events

BODY = HELLO | {"model": "@cf/test/model", "max_tokens": 9}
USED = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4)
END = End(reason="length", usage=USED)
USAGE = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 4,
    "output_tokens": 2,
}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def ask(**fields: Any) -> Ask:
    return parse(json.dumps(BODY | fields).encode())


def answer(**fields: Any) -> Answer:
    made = Answer(ask(**fields), request_id="r1")
    made.began(9)
    return made


def stream(*pieces: Piece) -> bytes:
    to = answer(stream=True)
    return b"".join(map(to.frames, pieces))


class TestAsks:
    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"model": None}, "/model"),
            ({"model": ""}, "/model"),
            ({"max_tokens": None}, "/max_tokens"),
            ({"max_tokens": 0}, "/max_tokens"),
            ({"messages": None}, "/messages"),
            ({"messages": []}, "/messages"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "/messages/0/role"),
            ({"messages": [{"role": "user", "content": []}]}, "/messages/0/content"),
            ({"messages": [{"role": "user", "content": 7}]}, "/messages/0/content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
                "/messages/0/content/0/type",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
                "/messages/0/content/0/tool_use_id",
            ),
            (
                {"messages": [*HELLO["messages"], {"role": "assistant", "content": "{"}]},
                "/messages/1/role",
            ),
            ({"system": 7}, "/system"),
            ({"system": [{"type": "image"}]}, "/system/0/type"),
            ({"temperature": 1.1}, "/temperature"),
            ({"top_p": 1.1}, "/top_p"),
            ({"top_k": -1}, "/top_k"),
            ({"stop_sequences": [""]}, "/stop_sequences/0"),
            ({"stop_sequences": 7}, "/stop_sequences"),
            ({"thinking": {"type": "much"}}, "/thinking/type"),
            ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "/tools/0/type"),
            (
                {"output_config": {"format": {"type": "json_schema", "schema": 7}}},
                "/output_config/format/schema",
            ),
            ({"output_config": {"format": {"type": "text"}}}, "/output_config/format/type"),
            ({"output_config": {"effort": "much"}}, "/output_config/effort"),
            ({"tools": [{"name": "f"}]}, "/tools/0/input_schema"),
            ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "/tool_choice/type"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "/tool_choice/name"),
        ],
    )
    def test_a_refusal_names_the_field(self, fields: dict[str, Any], pointer: str) -> None:
        assert refused(parse, BODY | fields).pointer == pointer

    def test_what_rides_along(self) -> None:
        asked = ask(
            stop_sequences=["a", "b"],
            temperature=1,
            top_k=7,
            top_p=0.5,
            stream=True,
            metadata={"user_id": "u"},
            thinking={"type": "enabled", "budget_tokens": 1024},
            service_tier="auto",
        )
        assert asked.stops == ("a", "b")
        assert asked.stream
        sampling = asked.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (
            *(9, 1.0),
            *(7, 0.5),
        )

    def test_the_format_is_what_the_answer_must_match(self) -> None:
        form = {"type": "json_schema", "schema": {"type": "object"}}
        grammar = ask(output_config={"effort": "low", "format": form}).grammar
        assert grammar == Grammar("json_schema", '{"type":"object"}')

    @pytest.mark.parametrize(
        ("fields", "effort"),
        [
            ({}, None),
            ({"output_config": {"effort": "low"}}, "low"),
            ({"output_config": {"effort": "max"}, "thinking": {"type": "adaptive"}}, "max"),
            ({"output_config": {"effort": "max"}, "thinking": {"type": "disabled"}}, "none"),
        ],
    )
    def test_how_much_is_to_be_thought(self, fields: dict[str, Any], effort: str | None) -> None:
        assert dict(ask(**fields).template_args).get("reasoning_effort") == effort

    def test_a_conversation_becomes_the_turns_of_a_template(self) -> None:
        call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
        told = [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "?"},
                    {"type": "text", "text": "b"},
                    call,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "2"},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "t3", "content": []},
                ],
            },
        ]
        system = [{"type": "text", "text": "s", "cache_control": {}}, {"type": "text", "text": "t"}]
        function = {"name": "f", "arguments": {"x": 1}}
        assert ask(system=system, messages=told).messages == (
            {"role": "system", "content": "s\n\nt"},
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "reasoning_content": "hm",
                "tool_calls": [{"type": "function", "function": function, "id": "t1"}],
            },
            {"role": "tool", "content": "2", "tool_call_id": "t1"},
            {"role": "tool", "content": "Error: ", "tool_call_id": "t2"},
            {"role": "tool", "content": "", "tool_call_id": "t3"},
            {"role": "user", "content": "and"},
        )

    def test_tokens_are_counted_without_a_limit_to_them(self) -> None:
        body = {name: value for name, value in BODY.items() if name != "max_tokens"}
        assert parse_count(json.dumps(body).encode()).messages == ask().messages

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(nearly_a_request | anything)
    def test_any_json_is_understood_or_refused(self, body: Any) -> None:
        body = {"max_tokens": 1, **body} if isinstance(body, dict) else body
        came = outcome(parse, json.dumps(body).encode())
        if isinstance(came, Failure):
            assert came.code in REFUSALS
            ErrorResponse.model_validate_json(error(came))
        else:
            assert came.messages
            assert came.model


class TestStreams:
    def test_the_bytes_of_a_short_one(self) -> None:
        message = (
            '{"id":"msg_r1","type":"message","role":"assistant","model":"@cf/test/model",'
            '"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":9,'
            '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}'
        )
        usage = (
            '{"input_tokens":5,"cache_creation_input_tokens":0,"cache_read_input_tokens":4,'
            '"output_tokens":2}'
        )
        assert stream(Text(text="Hel"), Text(text=""), Text(text="lo"), END).decode() == (
            f'event: message_start\ndata: {{"type":"message_start","message":{message}}}\n\n'
            'event: ping\ndata: {"type":"ping"}\n\n'
            'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
            '"content_block":{"type":"text","text":""}}\n\n'
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            '"delta":{"type":"text_delta","text":"Hel"}}\n\n'
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            '"delta":{"type":"text_delta","text":"lo"}}\n\n'
            'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
            'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":'
            f'"max_tokens","stop_sequence":null}},"usage":{usage}}}\n\n'
            'event: message_stop\ndata: {"type":"message_stop"}\n\n'
        )

    def test_thoughts_text_and_calls_are_blocks_of_their_own(self) -> None:
        told = events(
            stream(
                Reasoning(text="h"),
                Reasoning(text="m"),
                Text(text="Well"),
                ToolStart(index=0, id="c1", name="f"),
                ToolArguments(index=0, text='{"x":'),
                ToolArguments(index=0, text="1}"),
                ToolEnd(index=0),
                ToolStart(index=1, id="c2", name="g"),
                End(reason="tool_calls", usage=USED),
            )
        )
        for name, data in told:
            assert name == data["type"]
            if name != "ping":
                EVENT.validate_python(data)
        blocks = [data for name, data in told if name.startswith("content_block")]
        assert [(one["type"].removeprefix("content_block_"), one["index"]) for one in blocks] == [
            *[("start", 0), ("delta", 0), ("delta", 0), ("delta", 0), ("stop", 0)],
            *[("start", 1), ("delta", 1), ("stop", 1)],
            *[("start", 2), ("delta", 2), ("delta", 2), ("stop", 2)],
            *[("start", 3), ("stop", 3)],
        ]
        assert blocks[3]["delta"] == {"type": "signature_delta", "signature": ""}
        assert [one["content_block"] for one in blocks if "content_block" in one] == [
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "text", "text": ""},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
        ]
        assert told[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}

    def test_a_broken_one_ends_in_an_error_and_no_stop(self) -> None:
        *_, (name, last) = events(stream(Text(text="x"), Broke(code=Code.LOST, detail="gone")))
        assert name == "error"
        assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "gone"}}

    def test_what_is_told_at_once_has_the_same_bytes(self) -> None:
        to, other = answer(stream=True), answer(stream=True)
        assert to.text_frame("a") == b""  # no block is open
        to.frames(Text(text="a"))
        other.frames(Text(text="a"))
        assert to.text_frame('"é\n') == other.frames(Text(text='"é\n'))
        to.frames(ToolStart(index=0, id="c", name="f"))
        assert to.text_frame("b") == b""

    def test_however_it_is_cut_the_whole_is_the_same(self) -> None:
        for pieces in cuts(random.Random(5), times=200):
            message: dict[str, Any] = {}
            buffers: dict[int, str] = {}
            for _, data in events(stream(*pieces, End(reason="tool_calls", usage=USED))):
                match data["type"]:
                    case "message_start":
                        message = data["message"]
                    case "content_block_start":
                        message["content"].append(data["content_block"])
                        buffers[data["index"]] = ""
                    case "content_block_delta" if "signature" not in data["delta"]:
                        kind = data["delta"].pop("type")
                        buffers[data["index"]] += data["delta"].popitem()[1]
                        assert kind in {"text_delta", "thinking_delta", "input_json_delta"}
                    case "message_delta":
                        message |= data["delta"] | {"usage": data["usage"]}
            for block, text in zip(message["content"], buffers.values(), strict=True):
                member = {"text": "text", "thinking": "thinking", "tool_use": "input"}
                name = member[block["type"]]
                block[name] = json.loads(text) if name == "input" else text
            whole = answer().whole(pieces, End(reason="tool_calls", usage=USED))
            assert message == json.loads(whole)


class TestWholes:
    def test_a_message(self) -> None:
        body = answer().whole([Text(text="Hel"), Text(text="lo")], END)
        Message.model_validate_json(body, strict=True)
        assert json.loads(body) == {
            "id": "msg_r1",
            "type": "message",
            "role": "assistant",
            "model": "@cf/test/model",
            "content": [{"type": "text", "text": "Hello"}],
            "stop_reason": "max_tokens",
            "stop_sequence": None,
            "usage": USAGE,
        }

    @pytest.mark.parametrize(
        ("end", "reason", "sequence"),
        [
            (End(reason="stop", usage=USED), "end_turn", None),
            (End(reason="stop", usage=USED, stop="DE"), "stop_sequence", "DE"),
            (End(reason="length", usage=USED), "max_tokens", None),
            (End(reason="tool_calls", usage=USED), "tool_use", None),
        ],
    )
    def test_why_it_ended(self, end: End, reason: str, sequence: str | None) -> None:
        told = json.loads(answer().whole([], end))
        assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)
        assert told["content"] == []

    def test_arguments_that_were_cut_off_are_none(self) -> None:
        pieces = [ToolStart(index=0, id="c", name="f"), ToolArguments(index=0, text='{"x": 1')]
        body = answer().whole(pieces, END)
        assert Message.model_validate_json(body).content[0].input == {}  # type: ignore[union-attr]


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (Code.BAD_INPUT, "invalid_request_error"),
            (Code.WRONG_METHOD, "invalid_request_error"),
            (Code.UNKNOWN_MODEL, "not_found_error"),
            (Code.UNAUTHENTICATED, "authentication_error"),
            (Code.TOO_LARGE, "request_too_large"),
            (Code.NO_CAPACITY, "rate_limit_error"),
            (Code.LOST, "overloaded_error"),
            (Code.INTERNAL, "api_error"),
        ],
    )
    def test_anthropics_types(self, code: Code, kind: str) -> None:
        told = json.loads(error(Failure(code, "why")))
        assert told["type"] == "error"
        assert told["error"]["type"] == kind
        assert set(told) == {"type", "error"}
