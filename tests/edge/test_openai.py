import json
from typing import Any

import pytest
from hypothesis import given, settings

from edge.ask import Ask, Broke, End, Piece, Text, TokenLogprob, Usage
from edge.openai import Answer, error, parse
from routing.errors import Code, Failure
from tests.edge.bodies import HELLO, REFUSALS, anything, nearly_a_request, outcome, refused

BODY = HELLO | {"model": "@cf/test/model"}
END = End(reason="length", usage=Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4))
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def ask(**fields: Any) -> Ask:
    return parse(json.dumps(BODY | fields).encode())


def answer(**fields: Any) -> Answer:
    return Answer(ask(**fields), request_id="r1", created=1_700_000_000)


def chunks(to: Answer, *pieces: Piece) -> list[Any]:
    """What the events of these pieces hold; [DONE] as it is."""
    stream = b"".join(map(to.frames, pieces)).decode()
    *events, rest = stream.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


class TestAsks:
    def test_the_model_is_in_the_body(self) -> None:
        assert ask().model == "@cf/test/model"

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"model": None}, "/model"),
            ({"model": ""}, "/model"),
            ({"model": 7}, "/model"),
            ({"messages": None}, "/messages"),
            ({"messages": []}, "/messages"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "/messages/0/role"),
            ({"n": 129}, "/n"),
            ({"logprobs": 5}, "/logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "/top_logprobs"),
            ({"logprobs": True, "top_logprobs": -1}, "/top_logprobs"),
            ({"top_logprobs": 2}, "/top_logprobs"),
            ({"stream_options": {"include_usage": "yes"}}, "/stream_options/include_usage"),
            ({"stream_options": []}, "/stream_options"),
            ({"temperature": 2.1}, "/temperature"),
            ({"top_p": 1.1}, "/top_p"),
            ({"frequency_penalty": -2.1}, "/frequency_penalty"),
            ({"presence_penalty": 2.1}, "/presence_penalty"),
            ({"max_tokens": 0}, "/max_tokens"),
            ({"seed": 2**63}, "/seed"),
        ],
    )
    def test_a_refusal_names_the_field(self, fields: dict[str, Any], pointer: str) -> None:
        assert refused(parse, BODY | fields).pointer == pointer

    @pytest.mark.parametrize(
        ("name", "value", "becomes"),
        [
            ("temperature", 2, 2.0),
            ("top_p", 1, 1.0),
            ("frequency_penalty", -2, -2.0),
            ("presence_penalty", -2, -2.0),
            ("seed", 0, 0),
            ("seed", -1, 2**63 - 1),
            ("seed", 2**63 - 1, 2**63 - 1),
            ("top_k", 40, 40),
            ("max_completion_tokens", 7, None),
        ],
    )
    def test_the_documented_range_is_accepted(self, name: str, value: Any, becomes: Any) -> None:
        assert getattr(ask(**{name: value}).sampling, name, None) == becomes

    def test_speculation_can_be_switched_off(self) -> None:
        assert ask().sampling.speculate
        assert ask(speculative=True).sampling.speculate
        assert ask(speculative=None).sampling.speculate
        assert not ask(speculative=False).sampling.speculate
        assert refused(parse, BODY | {"speculative": "no"}).pointer == "/speculative"

    def test_the_end_of_text_can_be_ignored(self) -> None:
        assert not ask().sampling.ignore_eos
        assert ask(ignore_eos=True).sampling.ignore_eos
        assert refused(parse, BODY | {"ignore_eos": 1}).pointer == "/ignore_eos"

    def test_both_names_of_max_tokens_are_known(self) -> None:
        assert ask(max_tokens=7).sampling.max_tokens == 7
        assert ask(max_completion_tokens=8).sampling.max_tokens == 8

    @pytest.mark.parametrize(
        ("fields", "logprobs"),
        [
            ({}, None),
            ({"logprobs": False}, None),
            ({"logprobs": False, "top_logprobs": 0}, None),
            ({"logprobs": True}, 0),
            ({"logprobs": True, "top_logprobs": 20}, 20),
        ],
    )
    def test_logprobs_say_how_many_beside(
        self, fields: dict[str, Any], logprobs: int | None
    ) -> None:
        assert ask(**fields).sampling.logprobs == logprobs

    def test_usage_in_a_stream_is_asked_for(self) -> None:
        assert ask(stream=True, stream_options={"include_usage": True}).include_usage
        assert not ask(stream=True).include_usage

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(nearly_a_request | anything)
    def test_any_json_is_understood_or_refused(self, body: Any) -> None:
        came = outcome(parse, json.dumps(body).encode())
        if isinstance(came, Failure):
            assert came.code in REFUSALS
            assert json.loads(error(came))["error"]["message"]
        else:
            assert came.messages
            assert came.model


class TestStreams:
    def test_a_stream_begins_with_the_role_and_ends_with_the_reason(self) -> None:
        role, hello, how, finish, done = chunks(
            answer(stream=True), Text(text="Hello"), Text(text=""), Text(text=" How"), END
        )
        head = {
            "id": "chatcmpl-r1",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "@cf/test/model",
        }
        for chunk, delta, reason in [
            (role, {"role": "assistant", "content": ""}, None),
            (hello, {"content": "Hello"}, None),
            (how, {"content": " How"}, None),
            (finish, {}, "length"),
        ]:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            assert chunk == head | {"choices": [choice]}  # and no "usage" nor "logprobs" key
        assert done == "[DONE]"

    def test_usage_comes_last_where_it_was_asked_for(self) -> None:
        to = answer(stream=True, stream_options={"include_usage": True})
        *rest, last, done = chunks(to, Text(text="Hi"), END)
        assert last["choices"] == []
        assert last["usage"] == USAGE
        assert all("usage" not in chunk for chunk in rest)
        assert done == "[DONE]"

    def test_an_answer_without_text_still_has_a_role(self) -> None:
        role, finish, _ = chunks(answer(stream=True), END)
        assert role["choices"][0]["delta"]["role"] == "assistant"
        assert finish["choices"][0]["finish_reason"] == "length"

    @pytest.mark.parametrize("begun", [[], [Text(text="Hel")]])
    def test_a_broken_stream_ends_in_an_error_and_never_done(self, begun: list[Text]) -> None:
        *_, last = chunks(answer(stream=True), *begun, Broke(code=Code.TIMEOUT, detail="too long"))
        assert last["error"] == {
            "message": "too long",
            "type": "timeout_error",
            "param": None,
            "code": "timeout",
        }
        assert last["errors"] == [{"code": 3007, "message": "too long"}]

    def test_logprobs_ride_with_their_text(self) -> None:
        part = TokenLogprob(text="\udce2\udc82", logprob=-0.5, top=(("€", -1.0), ("\udcff", -2.0)))
        _, chunk, _, _ = chunks(
            answer(stream=True, logprobs=True, top_logprobs=2), Text(text="", logprobs=(part,)), END
        )
        assert chunk["choices"][0]["logprobs"]["content"] == [
            {
                "token": "\ufffd",
                "logprob": -0.5,
                "bytes": [0xE2, 0x82],
                "top_logprobs": [
                    {"token": "€", "logprob": -1.0, "bytes": [0xE2, 0x82, 0xAC]},
                    {"token": "\ufffd", "logprob": -2.0, "bytes": [0xFF]},
                ],
            }
        ]


class TestWholes:
    def test_a_whole_answer_is_a_chat_completion(self) -> None:
        assert json.loads(answer().whole([Text(text="Hel"), Text(text="lo")], END)) == {
            "id": "chatcmpl-r1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "@cf/test/model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello"},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
            "usage": USAGE,
        }

    def test_its_logprobs_are_one_list(self) -> None:
        texts = [
            Text(text=word, logprobs=(TokenLogprob(text=word, logprob=-1.0),)) for word in "ab"
        ]
        whole = json.loads(answer(logprobs=True).whole(texts, END))
        assert [one["token"] for one in whole["choices"][0]["logprobs"]["content"]] == ["a", "b"]


class TestErrors:
    def test_both_kinds_of_client_find_their_error(self) -> None:
        failure = refused(parse, BODY | {"messages": [{"role": "user", "content": 7}]})
        told = json.loads(error(failure))
        says = (
            "AiError: Bad input: Error: "
            "Type mismatch of '/messages/0/content', 'integer' not in 'string', 'array'"
        )
        assert told == {
            "error": {
                "message": says,
                "type": "invalid_request_error",
                "param": "messages.0.content",
                "code": "bad_input",
            },
            "result": None,
            "success": False,
            "errors": [{"code": 5006, "message": says}],
            "messages": [],
        }

    @pytest.mark.parametrize(
        ("code", "name"),
        [
            (Code.UNKNOWN_MODEL, "model_not_found"),
            (Code.UNAUTHENTICATED, "invalid_api_key"),
            (Code.NO_CAPACITY, "rate_limit_exceeded"),
            (Code.LOST, "lost"),
        ],
    )
    def test_openais_names_where_it_has_some(self, code: Code, name: str) -> None:
        assert json.loads(error(Failure(code, "why")))["error"]["code"] == name
