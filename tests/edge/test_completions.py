"""OpenAI's completions, spelled: bodies in, bodies and chunks out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.ask import Ask, End, Text, TokenLogprob, Usage
from edge.completions import Answer, parse
from tests.edge.bodies import refused

BODY: dict[str, Any] = {"model": "@cf/test/model", "prompt": "Hello"}
END = End(reason="length", usage=Usage(prompt_tokens=2, completion_tokens=3))


def asked(**fields: Any) -> Ask:
    return parse(json.dumps(BODY | fields).encode())


def spelled(ask: Ask, index: int = 0) -> Answer:
    return Answer(ask, request_id="r", created=7, index=index)


class TestAsks:
    def test_a_prompt_goes_to_the_model_as_it_is(self) -> None:
        ask = asked(max_tokens=4)
        assert (ask.prompt, ask.raw, ask.sampling.max_tokens) == ("Hello", True, 4)
        assert ask.choices == ()

    def test_token_ids_are_a_prompt(self) -> None:
        assert asked(prompt=[5, 6]).token_ids == (5, 6)
        both = asked(prompt=[[5], [6, 7]]).choices
        assert [it.token_ids for it in both] == [(5,), (6, 7)]

    def test_choices_are_numbered_prompt_by_prompt(self) -> None:
        ask = asked(prompt=["a", "b"], n=2, seed=10)
        assert [it.prompt for it in ask.choices] == ["a", "a", "b", "b"]
        assert [it.sampling.seed for it in ask.choices] == [10, 11, 10, 11]
        assert [it.counts_prompt for it in ask.choices] == [True, False, True, False]

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"prompt": None}, "/prompt"),
            ({"prompt": ""}, "/prompt"),
            ({"prompt": []}, "/prompt"),
            ({"prompt": 3}, "/prompt"),
            ({"prompt": [[]]}, "/prompt/0"),
            ({"prompt": ["a", ""]}, "/prompt/1"),
            ({"prompt": ["a", {}]}, "/prompt/1"),
            ({"prompt": [1, "a"]}, "/prompt/1"),
            ({"prompt": [1, -1]}, "/prompt/1"),
            ({"prompt": [1, True]}, "/prompt/1"),
            ({"prompt": ["a"] * 129}, "/prompt"),
            ({"prompt": ["a"] * 65, "n": 2}, "/n"),
            ({"n": 0}, "/n"),
            ({"n": 2, "best_of": 3}, "/best_of"),
            ({"suffix": "x"}, "/suffix"),
            ({"logprobs": 21}, "/logprobs"),
            ({"logprobs": 1, "echo": True}, "/echo"),
            ({"prompt": [1], "echo": True}, "/echo"),
            ({"model": ""}, "/model"),
        ],
    )
    def test_a_refusal_names_the_field(self, fields: dict[str, Any], pointer: str) -> None:
        assert refused(parse, BODY | fields).pointer == pointer


class TestAnswers:
    def test_a_whole_one(self) -> None:
        body = json.loads(spelled(asked(echo=True)).whole([Text(text=", "), Text(text="you")], END))
        assert body == {
            "id": "cmpl-r",
            "object": "text_completion",
            "created": 7,
            "model": "@cf/test/model",
            "choices": [
                {"text": "Hello, you", "index": 0, "logprobs": None, "finish_reason": "length"}
            ],
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": 3,
                "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }

    def test_a_stream(self) -> None:
        answer = spelled(asked(echo=True, stream_options={"include_usage": True}), index=1)
        said = answer.frames(Text(text=",")) + answer.text_frame(" you") + answer.frames(END)
        *chunks, done = said.decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        *texts, used = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        choices = [chunk["choices"][0] for chunk in texts]
        assert [it["text"] for it in choices] == ["Hello", ",", " you", ""]
        assert {it["index"] for it in choices} == {1}
        assert [it["finish_reason"] for it in choices] == [None, None, None, "length"]
        assert (used["choices"], used["usage"]["total_tokens"]) == ([], 5)

    def test_log_probabilities_are_lists_side_by_side(self) -> None:
        entries = (
            TokenLogprob(text="ab", logprob=-0.5, top=(("ab", -0.5), ("c", -1.0))),
            TokenLogprob(text="\udcff", logprob=-1.0),  # a byte that is no character
        )
        whole = spelled(asked(logprobs=2)).whole([Text(text="ab", logprobs=entries)], END)
        assert json.loads(whole)["choices"][0]["logprobs"] == {
            "tokens": ["ab", "\ufffd"],
            "token_logprobs": [-0.5, -1.0],
            "top_logprobs": [{"ab": -0.5, "c": -1.0}, {}],
            "text_offset": [0, 2],
        }
