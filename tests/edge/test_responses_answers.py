"""Answers of Responses: the events that build them up, and whole ones."""

from __future__ import annotations

import json
import random
from typing import Any

from openai.types.responses import Response

from edge.ask import (
    Broke,
    End,
    Piece,
    Reasoning,
    Text,
    TokenLogprob,
    ToolArguments,
    ToolEnd,
    ToolStart,
    Usage,
)
from edge.responses_answer import Answer
from routing.errors import Code
from tests.edge.responses import ask, stream
from tests.edge.streams import cuts

USED = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4)


END = End(reason="stop", usage=USED)


CUT = End(reason="length", usage=USED)


USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 11,
}


def answer(**fields: Any) -> Answer:
    return Answer(ask(**fields), request_id="r1", created=1_700_000_000)


class TestStreams:
    def test_the_events_of_a_short_one(self) -> None:
        told = stream(answer(stream=True), Text(text="Hel"), Text(text=""), Text(text="lo"), CUT)
        at = {"item_id": "msg_r1_0", "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        item = {"id": "msg_r1_0", "type": "message", "status": "in_progress", "role": "assistant"}
        cut = item | {"status": "incomplete", "content": [part | {"text": "Hello"}]}
        assert [
            {k: v for k, v in one.items() if k not in {"sequence_number", "response"}}
            for one in told
        ] == [
            {"type": "response.created"},
            {"type": "response.in_progress"},
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": item | {"content": []},
            },
            {"type": "response.content_part.added", **at, "part": part},
            {"type": "response.output_text.delta", **at, "delta": "Hel", "logprobs": []},
            {"type": "response.output_text.delta", **at, "delta": "lo", "logprobs": []},
            {"type": "response.output_text.done", **at, "text": "Hello", "logprobs": []},
            {"type": "response.content_part.done", **at, "part": part | {"text": "Hello"}},
            {"type": "response.output_item.done", "output_index": 0, "item": cut},
            {"type": "response.incomplete"},
        ]
        first, last = told[0]["response"], told[-1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert last["status"] == "incomplete"
        assert last["incomplete_details"] == {"reason": "max_output_tokens"}
        assert last["output"] == [cut]
        assert last["usage"] == USAGE

    def test_thoughts_text_and_calls_are_items_of_their_own(self) -> None:
        told = stream(
            answer(stream=True),
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
        assert [one["type"].removeprefix("response.") for one in told] == [
            *["created", "in_progress"],
            *["output_item.added", "content_part.added"],
            *["reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"],
            *["content_part.done", "output_item.done"],
            *["output_item.added", "content_part.added", "output_text.delta", "output_text.done"],
            *["content_part.done", "output_item.done"],
            *["output_item.added", "function_call_arguments.delta"],
            *["function_call_arguments.delta", "function_call_arguments.done"],
            "output_item.done",
            *["output_item.added", "function_call_arguments.done", "output_item.done"],
            "completed",
        ]
        assert told[-1]["response"]["output"] == [
            {
                "id": "rs_r1_0",
                "type": "reasoning",
                "status": "completed",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "hm"}],
            },
            {
                "id": "msg_r1_1",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Well", "annotations": []}],
            },
            {
                "id": "fc_r1_2",
                "type": "function_call",
                "status": "completed",
                "call_id": "c1",
                "name": "f",
                "arguments": '{"x":1}',
            },
            {
                "id": "fc_r1_3",
                "type": "function_call",
                "status": "incomplete",
                "call_id": "c2",
                "name": "g",
                "arguments": "",
            },
        ]

    def test_a_broken_one_ends_in_an_error_and_failed(self) -> None:
        told = stream(
            answer(stream=True), Text(text="x"), Broke(code=Code.TIMEOUT, detail="too long")
        )
        error, failed = told[-2:]
        assert (error["type"], error["code"], error["message"]) == ("error", "timeout", "too long")
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"] == {"code": "server_error", "message": "too long"}
        assert failed["response"]["output"][0]["content"][0]["text"] == "x"

    def test_what_is_told_at_once_has_the_same_bytes_and_counts(self) -> None:
        to, other = answer(stream=True), answer(stream=True)
        assert to.text_frame("a") == b""  # no item is open
        to.frames(Text(text="a"))
        other.frames(Text(text="a"))
        assert to.text_frame("lost") != b""  # and was not sent
        for text in ('"é\n', "b"):
            assert to.text_frame(text) == other.frames(Text(text=text))
            to.told(text)
        assert to.frames(END) == other.frames(END)
        assert to.response["output"][0]["content"][0]["text"] == 'a"é\nb'

    def test_with_logprobs_nothing_is_told_at_once(self) -> None:
        to = answer(stream=True, top_logprobs=1)
        part = TokenLogprob(text="\udce2", logprob=-0.5, top=(("€", -1.0),))
        told = stream(to, Text(text="b", logprobs=(part,)), Text(text="", logprobs=(part,)))
        assert to.text_frame("a") == b""
        entry = {"token": "\ufffd", "logprob": -0.5, "bytes": [0xE2]}
        top = [{"token": "€", "logprob": -1.0, "bytes": [0xE2, 0x82, 0xAC]}]
        assert [one["logprobs"] for one in told if one["type"].endswith("delta")] == [
            [entry | {"top_logprobs": top}]
        ] * 2
        to.frames(END)
        assert len(to.response["output"][0]["content"][0]["logprobs"]) == 2

    def test_log_probabilities_begin_no_item(self) -> None:
        """Each token has one, those of thoughts and calls too, beside empty text."""

        def beside(token: str, *pieces: Piece) -> list[Piece]:
            first, *rest = pieces or (Text(text=""),)
            entry = TokenLogprob(text=token, logprob=-0.5)
            if isinstance(first, Text):
                return [Text(text=first.text, logprobs=(entry,)), *rest]
            return [Text(text="", logprobs=(entry,)), first, *rest]

        pieces = [
            *beside("<think>"),
            *beside("h", Reasoning(text="h")),
            *beside("m", Reasoning(text="m")),
            *beside("</think>"),
            *beside("S"),  # held back, as the beginning of a stop string is
            *beside("o", Text(text="So")),
            *beside(".", Text(text=".")),
            *beside("<tool_call>"),
            *beside("f", ToolStart(index=0, id="c1", name="f")),
            *beside("{", ToolArguments(index=0, text="{")),
            *beside("}", ToolArguments(index=0, text="}"), ToolEnd(index=0)),
            *beside("</tool_call>"),
            End(reason="tool_calls", usage=USED),
        ]
        told = stream(answer(stream=True, top_logprobs=1), *pieces)
        whole = json.loads(answer(top_logprobs=1).whole(pieces[:-1], pieces[-1]))
        assert told[-1]["response"]["output"] == whole["output"]
        thoughts, text, call = whole["output"]
        assert thoughts["content"][0]["text"] == "hm"
        assert (call["name"], call["arguments"], call["status"]) == ("f", "{}", "completed")
        [part] = text["content"]
        assert part["text"] == "So."
        assert "".join(one["token"] for one in part["logprobs"]) == "</think>So.<tool_call>f"

    def test_however_it_is_cut_the_whole_is_the_same(self) -> None:
        end = End(reason="tool_calls", usage=USED)
        for pieces in cuts(random.Random(7), times=200):
            told = stream(answer(stream=True), *pieces, end)
            whole = json.loads(answer(stream=True).whole(pieces, end))
            assert told[-1]["response"] == whole
            said: dict[str, str] = {}
            for one in told:
                if one["type"].endswith(".delta"):
                    said[one["item_id"]] = said.get(one["item_id"], "") + one["delta"]
            done = [one["item"] for one in told if one["type"] == "response.output_item.done"]
            assert done == whole["output"]
            for item in done:
                text = item["content"][0]["text"] if "content" in item else item["arguments"]
                assert said[item["id"]] == text


class TestWholes:
    def test_a_response(self) -> None:
        to = answer(
            instructions="Be brief.",
            metadata={"a": "b"},
            temperature=0.5,
            max_output_tokens=7,
            user="u",
            tool_choice="none",
            tools=[{"type": "function", "name": "f"}],
        )
        body = to.whole([Text(text="Hel"), Text(text="lo")], END)
        Response.model_validate_json(body, strict=True)
        assert json.loads(body) == {
            "id": "resp_r1",
            "object": "response",
            "created_at": 1_700_000_000,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "model": "@cf/test/model",
            "output": [
                {
                    "id": "msg_r1_0",
                    "type": "message",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
                }
            ],
            "usage": USAGE,
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
            "parallel_tool_calls": True,
            "temperature": 0.5,
            "tool_choice": "none",
            "tools": [{"parameters": None, "strict": None, "type": "function", "name": "f"}],
            "top_p": None,
            "background": False,
            "max_output_tokens": 7,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": True,
            "text": {"format": {"type": "text"}},
            "top_logprobs": 0,
            "truncation": "disabled",
            "user": "u",
        }

    def test_an_answer_of_nothing_is_one(self) -> None:
        response = Response.model_validate_json(answer().whole([], END))
        assert response.output == []
        assert response.output_text == ""
