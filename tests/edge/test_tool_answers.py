"""Thoughts and calls of tools, as both APIs spell them."""

from __future__ import annotations

import json
from typing import Any

from edge import openai, workers_ai
from edge.ask import Ask, End, Piece, Reasoning, Said, Text, ToolArguments, ToolStart, Usage
from edge.tool_families import call_id
from tests.fakes.tool_answers import BOTH, PARIS, REQUEST, called

USED = Usage(prompt_tokens=9, completion_tokens=2)


CALLED = End(reason="tool_calls", usage=USED)


PLAIN = Ask(model="m", prompt="p")


CUT: list[Said] = [
    ToolStart(index=0, id="i", name="now"),
    ToolArguments(index=0, text='{"a": '),
]


def chunks(answer: openai.Answer | workers_ai.Answer, *pieces: Piece) -> list[Any]:
    *events, rest = b"".join(map(answer.frames, pieces)).decode().split("\n\n")
    assert rest == ""
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


class TestOpenAI:
    def answer(self) -> openai.Answer:
        return openai.Answer(PLAIN, request_id="r", created=0)

    def whole(self, *said: Said) -> dict[str, Any]:
        choice: dict[str, Any] = json.loads(self.answer().whole(said, CALLED))["choices"][0]
        return choice

    def deltas(self, *pieces: Piece) -> list[dict[str, Any]]:
        made = [chunk["choices"][0] for chunk in chunks(self.answer(), *pieces, CALLED)]
        assert made.pop()["finish_reason"] == "tool_calls"
        assert all(choice["finish_reason"] is None for choice in made)
        return [choice["delta"] for choice in made]

    def test_a_message_of_calls_has_no_content(self) -> None:
        choice = self.whole(*BOTH)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"] == {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call_id(REQUEST, 0),
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": PARIS},
                },
                {
                    "id": call_id(REQUEST, 1),
                    "type": "function",
                    "function": {"name": "now", "arguments": "{}"},
                },
            ],
        }

    def test_a_message_may_have_text_and_thoughts_too(self) -> None:
        message = self.whole(Reasoning(text="hm"), Text(text="Well."), *BOTH)["message"]
        assert message["content"] == "Well."
        assert message["reasoning_content"] == "hm"
        assert len(message["tool_calls"]) == 2

    def test_without_calls_there_is_no_word_of_them(self) -> None:
        assert self.whole(Text(text="Hi"))["message"] == {"role": "assistant", "content": "Hi"}

    def test_a_stream_names_a_call_first_and_then_its_arguments(self) -> None:
        halves = [ToolArguments(index=0, text=half) for half in (PARIS[:5], PARIS[5:])]
        deltas = self.deltas(Text(text="Well."), BOTH[0], *halves, *BOTH[2:])
        assert deltas == [
            {"role": "assistant", "content": ""},
            {"content": "Well."},
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": call_id(REQUEST, 0),
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": ""},
                    }
                ]
            },
            {"tool_calls": [{"index": 0, "function": {"arguments": PARIS[:5]}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": PARIS[5:]}}]},
            {
                "tool_calls": [
                    {
                        "index": 1,
                        "id": call_id(REQUEST, 1),
                        "type": "function",
                        "function": {"name": "now", "arguments": ""},
                    }
                ]
            },
            {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        ]

    def test_thoughts_are_deltas_of_their_own(self) -> None:
        assert self.deltas(Reasoning(text="hm"))[1] == {"reasoning_content": "hm"}


class TestNative:
    def whole(self, *said: Said) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(workers_ai.Answer().whole(said, CALLED))["result"]
        return result

    def test_arguments_are_an_object(self) -> None:
        assert self.whole(*BOTH) == {
            "response": "",
            "tool_calls": [
                {
                    "name": "get_weather",
                    "arguments": {"city": "Paris", "days": 3},
                    "id": call_id(REQUEST, 0),
                },
                {"name": "now", "arguments": {}, "id": call_id(REQUEST, 1)},
            ],
            "finish_reason": "tool_calls",
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
        }

    def test_there_are_no_calls_where_there_are_none(self) -> None:
        assert "tool_calls" not in self.whole(Text(text="Hi"))
        for frame in chunks(workers_ai.Answer(), Text(text="Hi"), CALLED):
            assert "tool_calls" not in frame
            assert isinstance(frame["response"], str)

    def test_a_stream_tells_all_calls_at_its_end_in_one_event(self) -> None:
        text, calls, last = chunks(workers_ai.Answer(), *BOTH, Text(text="Hi"), CALLED)
        assert text["response"] == "Hi"
        assert calls == {
            "response": "",
            "tool_calls": [
                {
                    "name": "get_weather",
                    "arguments": {"city": "Paris", "days": 3},
                    "id": call_id(REQUEST, 0),
                },
                {"name": "now", "arguments": {}, "id": call_id(REQUEST, 1)},
            ],
        }
        assert last["finish_reason"] == "tool_calls"

    def test_numbers_are_as_the_model_wrote_them(self) -> None:
        said = called(("now", '{"n": 1.10, "big": 123456789012345678901234567890, "u": "\\ud83d"}'))
        assert '"n": 1.10, "big": 123456789012345678901234567890' in (
            workers_ai.Answer().whole(said, CALLED).decode()
        )

    def test_what_did_not_become_a_call_is_text(self) -> None:
        text = '{"name": "now", "arguments": {"a": '
        assert self.whole(*CUT)["response"] == text
        assert "tool_calls" not in self.whole(*CUT)
        frame, last = chunks(workers_ai.Answer(), *CUT, CALLED)
        assert frame["response"] == text
        assert last["response"] == ""
        both = chunks(workers_ai.Answer(), *CUT, *BOTH, CALLED)
        assert [frame["response"] for frame in both] == [text, "", ""]
        assert len(both[1]["tool_calls"]) == 2

    def test_thoughts_are_beside_the_response(self) -> None:
        assert self.whole(Reasoning(text="hm"), Text(text="Hi"))["reasoning_content"] == "hm"
        frame, _ = chunks(workers_ai.Answer(), Reasoning(text="hm"), CALLED)
        assert frame.pop("p")
        assert frame == {"response": "", "reasoning_content": "hm"}
