import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.ask import Ask, Broke, End, SamplingAsk, Text, Usage
from edge.workers_ai import Answer, error, parse
from routing.errors import Code, Failure
from tests.edge.bodies import HELLO, REFUSALS, anything, nearly_a_request, outcome, refused

MODEL = "@cf/test/model"
END = End(reason="stop", usage=Usage(prompt_tokens=755, completion_tokens=10))


def ask(**fields: Any) -> Ask:
    return parse(json.dumps(HELLO | fields).encode(), MODEL)


def native(body: bytes) -> Ask:
    return parse(body, MODEL)


class TestPrompt:
    def test_messages_become_the_conversation(self) -> None:
        asked = ask()
        assert asked.model == MODEL
        assert asked.messages == ({"role": "user", "content": "Hello"},)
        assert asked.prompt is None
        assert not asked.stream

    def test_a_prompt_alone_is_kept_as_it_is(self) -> None:
        asked = native(b'{"prompt": "Once upon a time", "raw": true, "stream": true}')
        assert asked.prompt == "Once upon a time"
        assert asked.messages is None
        assert asked.raw
        assert asked.stream

    def test_null_counts_as_absent(self) -> None:
        nothing = dict.fromkeys(["prompt", "stream", "temperature", "stop", "tools", "lora", "n"])
        assert ask(**nothing) == ask()

    def test_unknown_fields_are_accepted(self) -> None:
        assert ask(tags=["x"], user="someone", store=True) == ask()

    def test_what_langchain_sends_is_accepted(self) -> None:
        asked = ask(temperature=1e-08, stop=None, options={"rejectIfBusy": True})
        assert asked.sampling.temperature == 1e-08

    def test_both_prompt_and_messages_are_one_too_many(self) -> None:
        assert (
            "give one of '/prompt' and '/messages'"
            in refused(native, HELLO | {"prompt": "Hi"}).detail
        )

    def test_neither_prompt_nor_messages_names_both(self) -> None:
        assert refused(native, {}).detail == (
            "AiError: Bad input: Error: oneOf at '/' not met, 0 matches: "
            "required properties at '/' are 'prompt', required properties at '/' are 'messages'"
        )

    def test_raw_needs_a_prompt(self) -> None:
        assert refused(native, HELLO | {"raw": True}).pointer == "/raw"

    def test_an_empty_prompt_is_refused(self) -> None:
        assert refused(native, {"prompt": ""}).pointer == "/prompt"


class TestMessages:
    @pytest.mark.parametrize(
        ("message", "pointer"),
        [
            ("hello", "/messages/0"),
            ({"content": "x"}, "/messages/0/role"),
            ({"role": "robot", "content": "x"}, "/messages/0/role"),
            ({"role": 7, "content": "x"}, "/messages/0/role"),
            ({"role": "user"}, "/messages/0/content"),
            ({"role": "user", "content": None}, "/messages/0/content"),
            ({"role": "assistant", "content": None, "tool_calls": []}, "/messages/0/content"),
            ({"role": "user", "content": 7}, "/messages/0/content"),
            ({"role": "user", "content": {"type": "text"}}, "/messages/0/content"),
            ({"role": "user", "content": ["x"]}, "/messages/0/content/0"),
            ({"role": "user", "content": [{"text": "x"}]}, "/messages/0/content/0/type"),
            ({"role": "user", "content": [{"type": "text"}]}, "/messages/0/content/0/text"),
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                "/messages/0/content/0/type",
            ),
            ({"role": "user", "content": "x", "name": 7}, "/messages/0/name"),
            ({"role": "assistant", "tool_calls": {}}, "/messages/0/tool_calls"),
            ({"role": "assistant", "tool_calls": [{}]}, "/messages/0/tool_calls/0/name"),
            (
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 7}]},
                "/messages/0/tool_calls/0/arguments",
            ),
        ],
    )
    def test_a_refusal_names_the_place(self, message: Any, pointer: str) -> None:
        failure = refused(native, {"messages": [message]})
        assert failure.pointer == pointer
        assert f"'{pointer}'" in failure.detail or "required properties" in failure.detail

    @pytest.mark.parametrize("messages", [[], "hello", {}, 7])
    def test_what_is_no_conversation_is_refused(self, messages: Any) -> None:
        assert refused(native, {"messages": messages}).pointer == "/messages"

    def test_text_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
        asked = ask(messages=[{"role": "user", "content": parts}])
        assert asked.messages == ({"role": "user", "content": "Hello, world"},)

    def test_a_developer_speaks_as_the_system(self) -> None:
        asked = ask(messages=[{"role": "developer", "content": "Be brief."}])
        assert asked.messages == ({"role": "system", "content": "Be brief."},)

    @pytest.mark.parametrize(
        "call",
        [
            {"name": "weather", "arguments": {"city": "Oslo"}},
            {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        ],
    )
    def test_both_shapes_of_a_tool_call_become_one(self, call: dict[str, Any]) -> None:
        turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"} | call]}
        asked = ask(messages=[turn, {"role": "tool", "content": "9°", "tool_call_id": "c1"}])
        assert asked.messages is not None
        made = {"name": "weather", "arguments": {"city": "Oslo"}}
        calls = [{"id": "c1", "type": "function", "function": made}]
        assert asked.messages[0] == {"role": "assistant", "content": "", "tool_calls": calls}
        assert asked.messages[1] == {"role": "tool", "content": "9°", "tool_call_id": "c1"}


# field, what is accepted and what it becomes, what is refused
RANGES: list[tuple[str, list[tuple[Any, Any]], list[Any]]] = [
    ("max_tokens", [(1, 1), (256.0, 256), (100_000, 100_000)], [0, -1, 1.5, 10**30]),
    ("temperature", [(0, 0.0), (0.6, 0.6), (5, 5.0)], [-0.1, 5.1]),
    ("top_p", [(0, 0.0), (0.9, 0.9), (1, 1.0), (1.5, 1.0), (2, 1.0)], [-0.1, 2.1]),
    ("top_k", [(1, 1), (50, 50)], [0, -1, 51, 2.5]),
    ("min_p", [(0, 0.0), (1, 1.0)], [-0.1, 1.1]),
    ("seed", [(0, 0), (1, 1), (9_999_999_999, 9_999_999_999)], [-1, 10_000_000_000, 0.5]),
    (
        "repetition_penalty",
        [(0, 1.0), (1e-9, 0.01), (1.1, 1.1), (2, 2.0)],
        [-0.1, 2.1],
    ),
    ("frequency_penalty", [(0, 0.0), (2, 2.0)], [-0.1, 2.1]),
    ("presence_penalty", [(0, 0.0), (2, 2.0)], [-0.1, 2.1]),
]
WRONG_TYPES = ["1", True, False, [], {}, [1]]


class TestSampling:
    def test_nothing_said_is_nothing_asked(self) -> None:
        assert ask().sampling == SamplingAsk()

    @pytest.mark.parametrize(
        ("name", "value", "becomes"),
        [(name, *pair) for name, accepted, _ in RANGES for pair in accepted],
    )
    def test_the_documented_range_is_accepted(self, name: str, value: Any, becomes: Any) -> None:
        got = getattr(ask(**{name: value}).sampling, name)
        assert got == becomes
        assert type(got) is type(becomes)

    @pytest.mark.parametrize(
        ("name", "value"), [(name, value) for name, _, outside in RANGES for value in outside]
    )
    def test_outside_it_the_field_is_named(self, name: str, value: Any) -> None:
        failure = refused(native, HELLO | {name: value})
        assert failure.pointer == f"/{name}"
        assert f"'/{name}'" in failure.detail

    @pytest.mark.parametrize("name", [name for name, _, _ in RANGES])
    @pytest.mark.parametrize("value", WRONG_TYPES)
    def test_another_type_is_a_mismatch(self, name: str, value: Any) -> None:
        failure = refused(native, HELLO | {name: value})
        assert failure.detail.startswith(
            f"AiError: Bad input: Error: Type mismatch of '/{name}', '"
        )

    def test_speculation_can_be_switched_off(self) -> None:
        assert ask(speculative=True).sampling.speculate
        assert not ask(speculative=False).sampling.speculate
        assert refused(native, HELLO | {"speculative": 0}).pointer == "/speculative"

    def test_the_newer_name_of_max_tokens_counts(self) -> None:
        assert ask(max_tokens=10, max_completion_tokens=20).sampling.max_tokens == 20
        assert refused(native, HELLO | {"max_completion_tokens": 0}).pointer == (
            "/max_completion_tokens"
        )

    def test_logit_bias_is_by_token_id(self) -> None:
        assert ask(logit_bias={"5": -100, "17": 2.5}).sampling.logit_bias == (
            (5, -100.0),
            (17, 2.5),
        )

    @pytest.mark.parametrize(
        ("bias", "pointer"),
        [
            ({"x": 1}, "/logit_bias/x"),
            ({"-1": 1}, "/logit_bias/-1"),
            ({"²": 1}, "/logit_bias/²"),
            ({"a/b~": 1}, "/logit_bias/a~1b~0"),
            ({"9" * 30: 1}, "/logit_bias/" + "9" * 30),
            ({"5": 101}, "/logit_bias/5"),
            ({"5": "1"}, "/logit_bias/5"),
            ([], "/logit_bias"),
            ({str(n): 1 for n in range(1025)}, "/logit_bias"),
        ],
    )
    def test_a_bad_bias_is_named(self, bias: Any, pointer: str) -> None:
        assert refused(native, HELLO | {"logit_bias": bias}).pointer == pointer


class TestStops:
    @pytest.mark.parametrize(
        ("stop", "stops"),
        [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (["x"] * 16, ("x",) * 16)],
    )
    def test_one_or_a_list(self, stop: Any, stops: tuple[str, ...]) -> None:
        assert ask(stop=stop).stops == stops

    @pytest.mark.parametrize(
        ("stop", "pointer"),
        [
            ("", "/stop"),
            (7, "/stop"),
            ({}, "/stop"),
            (["a", ""], "/stop/1"),
            (["a", None], "/stop/1"),
            ([7], "/stop/0"),
            (["x"] * 17, "/stop"),
            ("x" * 1001, "/stop"),
        ],
    )
    def test_others_are_refused(self, stop: Any, pointer: str) -> None:
        assert refused(native, HELLO | {"stop": stop}).pointer == pointer


class TestFeatures:
    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": []},
            {"tools": [{"name": "f"}], "tool_choice": "none"},
            {"tool_choice": "auto"},
            {"functions": []},
            {"response_format": {"type": "text"}},
            {"lora": ""},
            {"n": 1},
            {"logprobs": False, "top_logprobs": 0},
            {"options": {}},
        ],
    )
    def test_what_asks_for_nothing_passes(self, fields: dict[str, Any]) -> None:
        assert ask(**fields) == ask()

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"tools": "f"}, "/tools"),
            ({"tool_choice": "required"}, "/tool_choice"),
            ({"tool_choice": 7}, "/tool_choice"),
            ({"functions": [{"name": "f", "code": ""}]}, "/functions"),
            ({"lora": "my-adapter"}, "/lora"),
            ({"image": [1, 2]}, "/image"),
            ({"n": 2}, "/n"),
            ({"n": 0}, "/n"),
            ({"logprobs": True}, "/logprobs"),
            ({"top_logprobs": 3}, "/top_logprobs"),
            ({"options": {"rejectIfBusy": "yes"}}, "/options/rejectIfBusy"),
            ({"options": []}, "/options"),
            ({"stream": "true"}, "/stream"),
            ({"stream": 1}, "/stream"),
            ({"raw": "false"}, "/raw"),
        ],
    )
    def test_what_cannot_be_had_is_refused_by_name(
        self, fields: dict[str, Any], pointer: str
    ) -> None:
        failure = refused(native, HELLO | fields)
        assert failure.pointer == pointer


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b" ",
            b"{",
            b"prompt=hello",
            b'{"prompt": "a"} x',
            b'{"prompt": "\xff"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "a", "temperature": NaN}',
            b'{"prompt": "a", "temperature": Infinity}',
            b'{"prompt": "a", "temperature": 1e999}',
            b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
            b"[" * 100_000,
            b'{"a":' * 100_000,
        ],
    )
    def test_what_is_no_json_is_refused(self, body: bytes) -> None:
        assert refused(native, body).pointer == ""

    @pytest.mark.parametrize("body", [b"null", b"[]", b'"prompt"', b"7", b"true"])
    def test_json_that_is_no_object_is_refused(self, body: bytes) -> None:
        assert "Type mismatch of '/'" in refused(native, body).detail

    def test_tool_arguments_that_are_no_json_stay_text(self) -> None:
        assert self.arguments("[" * 100_000) == "[" * 100_000
        assert self.arguments("7") == 7
        assert self.arguments('{"a": [1, {"b": []}]}') == {"a": [1, {"b": []}]}

    @pytest.mark.parametrize("spell", [lambda nested: nested, json.dumps])
    def test_tool_arguments_nested_too_deeply_are_refused(self, spell: Any) -> None:
        """The decoder takes some 1,000 levels, more than what walks them later can."""

        def nested(depth: int) -> Any:
            return spell(json.loads('{"a":' * depth + "1" + "}" * depth))

        assert self.arguments(nested(100))
        for depth in (101, 800):
            call = {"name": "f", "arguments": nested(depth)}
            body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
            assert refused(native, body).pointer == "/messages/0/tool_calls/0/arguments"

    def arguments(self, spelled: Any) -> Any:
        """What becomes of a tool call's arguments."""
        call = {"name": "f", "arguments": spelled}
        asked = ask(messages=[{"role": "assistant", "tool_calls": [call]}])
        assert asked.messages is not None
        return asked.messages[0]["tool_calls"][0]["function"]["arguments"]

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(nearly_a_request | anything)
    def test_any_json_is_understood_or_refused(self, body: Any) -> None:
        came = outcome(native, json.dumps(body).encode())
        if isinstance(came, Failure):
            assert came.code in REFUSALS
            told = json.loads(error(came))["errors"][0]["code"]
            assert told == came.code.meaning.public
        else:
            assert (came.messages is None) != (came.prompt is None)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_understood_or_refused(self, body: bytes) -> None:
        came = outcome(native, body)
        assert isinstance(came, Ask) or came.code is Code.BAD_INPUT


class TestAnswers:
    def test_events_do_not_tell_how_long_their_text_is(self) -> None:
        answer = Answer()
        texts = [Text(text=text) for text in ("a", "\u00e9", '"', "a longer word", "x" * 30)]
        assert len({len(answer.frames(text)) for text in texts}) == 1
        longer = [Text(text="x" * length) for length in range(31, 63)]
        assert len({len(answer.frames(text)) for text in longer}) == 1

    def test_a_stream_is_as_cloudflares(self) -> None:
        answer = Answer()
        pieces = [Text(text="Hello"), Text(text=""), Text(text=" How"), END]
        assert b"".join(map(answer.frames, pieces)).decode() == (
            'data: {"response":"Hello","p":"abcdefghijklmnopqrstuvwxy"}\n\n'
            'data: {"response":" How","p":"abcdefghijklmnopqrstuvwxyz"}\n\n'
            'data: {"response":"","finish_reason":"stop","usage":'
            '{"prompt_tokens":755,"completion_tokens":10,"total_tokens":765}}\n\n'
            "data: [DONE]\n\n"
        )

    def test_cached_tokens_are_told_where_there_are_some(self) -> None:
        used = Usage(prompt_tokens=6377, completion_tokens=349, cached_tokens=2861)
        assert Answer().frames(End(reason="stop", usage=used)).decode() == (
            'data: {"response":"","finish_reason":"stop",'
            '"usage":{"prompt_tokens":6377,"completion_tokens":349,'
            '"total_tokens":6726,"prompt_tokens_details":{"cached_tokens":2861}}}\n\n'
            "data: [DONE]\n\n"
        )

    def test_a_broken_stream_says_so_and_never_done(self) -> None:
        frames = Answer().frames(Broke(code=Code.LOST, detail="the worker is gone")).decode()
        name, data, *rest = frames.split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: ")) == {
            "result": None,
            "success": False,
            "errors": [{"code": 7009, "message": "the worker is gone"}],
            "messages": [],
        }
        assert rest == ["", ""]

    def test_a_whole_answer_is_enveloped(self) -> None:
        assert json.loads(Answer().whole([Text(text="Hel"), Text(text="lo")], END)) == {
            "result": {
                "response": "Hello",
                "finish_reason": "stop",
                "usage": {"prompt_tokens": 755, "completion_tokens": 10, "total_tokens": 765},
            },
            "success": True,
            "errors": [],
            "messages": [],
        }

    @pytest.mark.parametrize("code", list(Code))
    def test_every_failure_has_its_public_code(self, code: Code) -> None:
        told = json.loads(error(Failure(code, "some detail")))
        assert told["success"] is False
        assert told["result"] is None
        assert told["errors"][0]["code"] == code.meaning.public

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (Code.UNAUTHENTICATED, "Authentication error"),
            (Code.NO_CAPACITY, "Capacity temporarily exceeded, please try again."),
        ],
    )
    def test_documented_messages_are_word_for_word(self, code: Code, message: str) -> None:
        assert json.loads(error(Failure(code, "why")))["errors"][0]["message"] == message
