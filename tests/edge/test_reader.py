"""Answers with calls: every family's, cut anywhere, broken in all ways that models have."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.ask import Reasoning, Said, Text, ToolArguments, ToolAsk, ToolEnd, ToolStart
from edge.gathered import gather, joined
from edge.reader import Reader
from edge.thinking import THINKING
from edge.tool_families import BY_NAME, HIDDEN, call_id, hidden_markers, spelled
from tests.fakes.tool_answers import BOTH, CALLS, NOW, PARIS, REQUEST, WEATHER, called, said, spoken
from tests.fakes.tool_templates import SPECIAL

TOOLS = ToolAsk(offered=(WEATHER, NOW))
THINK = THINKING[0]


def reader(family: str | None, **about: Any) -> Reader:
    made = {"tools": TOOLS, "request_id": REQUEST} | about
    return Reader(family=BY_NAME[family] if family else None, **made)


def read(family: str | None, *parts: str, **about: Any) -> list[Said]:
    """What these parts of an answer are, put together."""
    made = reader(family, **about)
    pieces = [piece for part in parts for piece in made.push(part)]
    return joined([*pieces, *made.finish()])


def cut(text: str, rng: random.Random) -> list[str]:
    """Into pieces of any lengths, 0 too."""
    at = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(1, 12)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def assert_cuts_change_nothing(family: str | None, text: str, **about: Any) -> list[Said]:
    whole = read(family, text, **about)
    for at in range(len(text) + 1):
        assert read(family, text[:at], text[at:], **about) == whole, at
    assert read(family, *text, **about) == whole
    rng = random.Random(text)
    for _ in range(50):
        parts = cut(text, rng)
        assert read(family, *parts, **about) == whole, parts
    return whole


def _inside(mark: str, text: str) -> list[int]:
    """Where a text would be cut in the middle of a mark: tokens are whole."""
    found = [at for at in range(len(text)) if text.startswith(mark, at)]
    return [at + step for at in found for step in range(1, len(mark))]


def test_glm_may_write_all_in_one_line() -> None:
    """As the templates of 4.7 and later have it."""
    weather, now = CALLS["glm"]
    text = weather.replace("\n", "") + now.replace("\n", "")
    assert text.endswith("</arg_value></tool_call><tool_call>now</tool_call>")
    assert assert_cuts_change_nothing("glm", text) == BOTH
    other = f"<tool_call>{'x' * 300}<arg_key>"
    assert assert_cuts_change_nothing("glm", other) == [Text(text=other)]


@pytest.mark.parametrize("family", CALLS)
class TestFamilies:
    def test_two_calls(self, family: str) -> None:
        assert assert_cuts_change_nothing(family, said(family)) == BOTH

    def test_two_calls_of_special_tokens(self, family: str) -> None:
        """The same, where marks are tokens that no text can spell."""
        hidden = SPECIAL.get(family, ())
        text = spelled(said(family), hidden)
        assert assert_cuts_change_nothing(family, text, hidden=hidden) == BOTH

    def test_a_tool_with_the_longest_name(self, family: str) -> None:
        name = "x" * 128
        tools = ToolAsk(offered=(replace(WEATHER, name=name), NOW))
        text = said(family).replace("get_weather", name)
        [first, *_] = gather(read(family, text, tools=tools)).calls
        assert (first.name, first.arguments) == (name, PARIS)

    def test_text_before_and_after(self, family: str) -> None:
        before, after = "Let me <see> [x] {y}.\n\n", "\n\nThat was it."
        tag = "<|python_tag|>" if family == "llama3" else ""  # bare calls only begin an answer
        pieces = assert_cuts_change_nothing(family, before + tag + said(family) + after)
        assert pieces == [Text(text=before), *BOTH, Text(text=after)]

    def test_space_around_calls_is_nothing(self, family: str) -> None:
        assert read(family, f"\n\n {said(family)}\n") == BOTH
        text = "<|python_tag|>" if family == "llama3" else ""
        assert read(family, f"Well.{text}{said(family)}\n")[1:] == BOTH

    @pytest.mark.parametrize("hide", [False, True])
    def test_wherever_it_ends_nothing_is_lost(self, family: str, hide: bool) -> None:
        """Each beginning of an answer: a call, or part of one, or text; never less each time."""
        hidden = SPECIAL.get(family, ()) if hide else ()
        text = spelled(said(family), hidden)
        names = []
        inside = [at for mark in hidden for at in _inside(HIDDEN + mark, text)]
        for end in sorted({*range(len(text) + 1)} - {*inside}):
            made = gather(pieces := read(family, text[:end], hidden=hidden))
            names.append([call.name for call in made.calls])
            assert HIDDEN not in made.text
            for call in made.calls:
                if call.whole:
                    assert isinstance(json.loads(call.arguments), dict)
            if not made.calls and not hide:
                assert made.text.strip() == text[:end].strip()
            assert [piece.index for piece in pieces if isinstance(piece, ToolStart)] == [
                *range(len(made.calls))
            ]
        assert names == sorted(names, key=len)
        assert names[-1] == ["get_weather", "now"]

    def test_a_tool_that_was_not_offered_is_text(self, family: str) -> None:
        text = said(family).replace("get_weather", "get_whether").replace("now", "nix")
        assert assert_cuts_change_nothing(family, text) == spoken(text)

    def test_without_calls_all_is_text_at_once(self, family: str) -> None:
        made = reader(family)
        assert made.push("Hello") == [Text(text="Hello")]
        assert made.push(" there.") == [Text(text=" there.")]
        assert made.finish() == []

    def test_arguments_come_as_they_are_made(self, family: str) -> None:
        made, told = reader(family), 0
        for character in CALLS[family][0].replace("%s", PARIS):
            told += sum(isinstance(piece, ToolArguments) for piece in made.push(character))
        assert told > 5

    def test_one_call_is_enough_where_no_more_are_wanted(self, family: str) -> None:
        tools = ToolAsk(offered=(WEATHER, NOW), most=1)
        made = reader(family, tools=tools)
        pieces: list[Said] = []
        for character in said(family):
            pieces += made.push(character)
            if made.full:
                break
        assert made.full
        assert joined(pieces) == called(("get_weather", PARIS))
        assert read(family, said(family), tools=tools) == called(("get_weather", PARIS))

    def test_ids_are_the_same_each_time_and_differ_from_each_other(self, family: str) -> None:
        ids = [piece.id for piece in read(family, said(family)) if isinstance(piece, ToolStart)]
        assert ids == [call_id(REQUEST, 0), call_id(REQUEST, 1)]
        assert len({*ids, call_id("r2", 0)}) == 3
        assert len(ids[0]) == len("call_") + 24


class TestObjects:
    def one(self, call: str) -> list[Said]:
        return assert_cuts_change_nothing("hermes", f"<tool_call>{call}</tool_call>")

    @pytest.mark.parametrize(
        ("call", "arguments"),
        [
            ('{"name":"now","arguments":{}}', "{}"),
            ('{"arguments": {"a": [1, {"b": "}"}]}, "name": "now"}', '{"a": [1, {"b": "}"}]}'),
            ('{"name": "now"}', "{}"),
            ('{"name": "now", "arguments": null}', None),
            ('{"name": "now", "parameters": {"a": 1}}', '{"a": 1}'),
            ('{"name": "now", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
            ('{"id": 7, "name": "now", "arguments": {"a": 1}, "more": [true]}', '{"a": 1}'),
            (' { "name" : "now" , "arguments" : { "a" : -1.5e3 } } ', '{ "a" : -1.5e3 }'),
            ('{"name": "now", "arguments": {"a": "x\ny\tz"}}', '{"a": "x\\ny\\tz"}'),
            ('{"name": "now", "arguments": {"a": "\\u00e9\\"</tool_call>"}}', None),
            ('{"name": "now", "arguments": {"a": "🙂"}}', '{"a": "🙂"}'),
        ],
    )
    def test_calls_however_they_are_written(self, call: str, arguments: str | None) -> None:
        pieces = self.one(call)
        if arguments is not None:
            assert pieces == called(("now", arguments))

    def test_null_arguments_are_no_object(self) -> None:
        call = '<tool_call>{"name": "now", "arguments": null}</tool_call>'
        assert read("hermes", call) == spoken(call)

    def test_a_mark_inside_a_string_ends_nothing(self) -> None:
        pieces = self.one('{"name": "now", "arguments": {"a": "</tool_call> <tool_call>"}}')
        assert pieces == called(("now", '{"a": "</tool_call> <tool_call>"}'))

    @pytest.mark.parametrize(
        "call",
        [
            "",
            " is how I call tools",
            "{}",
            "[1]",
            '{"name": 7, "arguments": {}}',
            '{"name": "now" "arguments": {}}',
            '{"name": "now", "arguments": [1]}',
            '{"name": "now", "arguments": "text"}',
            '{"name": "now", "arguments": 1.}',
            '{"arguments": {"a": }, "name": "now"}',
            "{'name': 'now', 'arguments': {}}",
            '{"arguments": {}}',
            '{"name": "now"',
        ],
    )
    def test_what_is_no_call_is_text(self, call: str) -> None:
        text = f"<tool_call>{call}</tool_call>"
        assert self.one(call) == spoken(text)
        both = assert_cuts_change_nothing("hermes", text + "\n" + said("hermes"))
        assert both == [*spoken(text + "\n"), *BOTH]

    def test_json_that_breaks_once_it_has_begun_is_a_call_without_an_end(self) -> None:
        text = '<tool_call>{"name": "now", "arguments": {"a": oh}}</tool_call> well'
        start, arguments, after = assert_cuts_change_nothing("hermes", text)
        assert isinstance(start, ToolStart)
        assert arguments == ToolArguments(index=0, text='{"a": oh}}')
        assert after == Text(text=" well")

    def test_what_is_cut_off_has_no_end(self) -> None:
        pieces = read("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1')
        assert pieces[1:] == [ToolArguments(index=0, text='{"a": 1')]

    def test_a_call_without_its_closing_mark_is_a_call(self) -> None:
        pieces = read("hermes", '<tool_call>{"name": "now", "arguments": {}}')
        assert pieces == called(("now", "{}"))

    def test_a_call_of_no_tool_is_held_back_no_longer_than_its_name(self) -> None:
        made = reader("hermes")
        assert made.push('<tool_call>{"name": "nope') == []
        assert gather(made.push('", ')).text == '<tool_call>{"name": "nope", '

    def test_a_mark_is_held_back_no_longer_than_it_may_be_one(self) -> None:
        made = reader("hermes")
        assert made.push("a <tool") == [Text(text="a ")]
        assert made.push("box> b") == [Text(text="<toolbox> b")]

    @pytest.mark.parametrize("family", ["llama3", "prompted"])
    def test_a_bare_object_is_a_call_where_an_answer_begins(self, family: str) -> None:
        call = '{"name": "now", "parameters": {"a": 1}}'
        assert assert_cuts_change_nothing(family, call) == called(("now", '{"a": 1}'))
        for text in [
            f"So: {call}",
            '{"name": "Bob", "parameters": {}}',
            '{"a": 1} <tool_call',
            "{",
        ]:
            assert assert_cuts_change_nothing(family, text) == spoken(text)

    def test_llamas_tag_opens_a_call_anywhere(self) -> None:
        text = 'I see. <|python_tag|>{"name": "now", "parameters": {}}'
        pieces = assert_cuts_change_nothing("llama3", text)
        assert pieces == [Text(text="I see. "), *called(("now", "{}"))]

    def test_special_tokens_are_never_text(self) -> None:
        hidden = SPECIAL["kimi_k2"]
        text = spelled(
            "a<|tool_call_end|>b<|tool_calls_section_begin|>c<|tool_call_begin|>", hidden
        )
        assert assert_cuts_change_nothing("kimi_k2", text, hidden=hidden) == spoken("abc")
        plain = "a<|tool_call_end|>b"  # the same in ordinary tokens
        assert read("kimi_k2", plain, hidden=hidden) == spoken(plain)

    def test_only_special_tokens_among_a_familys_marks_are_hidden(self) -> None:
        special = {"[TOOL_CALLS]", "<s>"}
        assert hidden_markers(BY_NAME["mistral"].texts, special) == {"[TOOL_CALLS]"}


class TestTags:
    def test_parameters_are_read_by_their_types(self) -> None:
        tool = WEATHER.__class__(
            name="f",
            parameters={
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "n": {"type": ["integer", "null"]},
                    "b": {"type": "boolean"},
                    "o": {"type": "object"},
                    "e": {"enum": ["1", "2"]},
                    "m": {"type": ["string", "null"]},
                    # As Pydantic spells what may be left out.
                    "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "none": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "any": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a"}]},
                },
            },
        )
        values = {
            "s": 'a "b"\n<c> {1}',
            "n": "7",
            "b": "True",
            "o": '{"x": [1]}',
            "e": "1",
            "m": "12",
            "zip": "12345",
            "none": "null",
            "any": "[1]",
            "unknown": "[1]",
            "words": "no json",
        }
        text = "<tool_call>\n<function=f>\n"
        for name, value in values.items():
            text += f"<parameter={name}>\n{value}\n</parameter>\n"
        text += "</function>\n</tool_call>"
        about = {"tools": ToolAsk(offered=(tool,))}
        made = gather(assert_cuts_change_nothing("qwen3_coder", text, **about))
        assert json.loads(made.calls[0].arguments) == {
            "s": 'a "b"\n<c> {1}',
            "n": 7,
            "b": True,
            "o": {"x": [1]},
            "e": "1",
            "m": "12",
            "zip": "12345",
            "none": None,
            "any": [1],
            "unknown": [1],
            "words": "no json",
        }
        assert made.calls[0].whole

    def test_text_in_a_text_parameter_comes_as_it_is_made(self) -> None:
        made = reader("qwen3_coder")
        made.push("<tool_call><function=get_weather><parameter=city>\nPa")
        assert made.push("ris <") == [ToolArguments(index=0, text="ris ")]

    def test_what_is_no_parameter_ends_the_call(self) -> None:
        pieces = assert_cuts_change_nothing(
            "qwen3_coder", "<tool_call>\n<function=now>\nwell</function>"
        )
        assert not any(isinstance(piece, ToolEnd) for piece in pieces)
        assert gather(pieces).text.strip() == "well</function>"


class TestThoughts:
    @pytest.mark.parametrize(
        ("text", "begun", "thought", "told"),
        [
            ("<think>\nhm,\n\nso\n</think>\n\nHi", False, "hm,\n\nso", "Hi"),
            ("\n<think>hm</think>Hi", False, "hm", "Hi"),
            ("hm\n</think>\n\nHi", True, "hm", "Hi"),
            ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
            ("Hi <think>x</think>", False, "", "Hi <think>x</think>"),
            ("Hi", False, "", "Hi"),
            ("<thin", False, "", "<thin"),
            ("<think>hm, I", False, "hm, I", ""),
            ("hm </thi", True, "hm </thi", ""),
            ("  ", False, "", "  "),
        ],
    )
    def test_thoughts_come_first(self, text: str, begun: bool, thought: str, told: str) -> None:
        for family in (None, "hermes"):
            about = {"thinking": THINK, "thinks": begun}
            made = gather(assert_cuts_change_nothing(family, text, **about))
            assert (made.reasoning, made.text) == (thought, told)

    def test_a_call_in_thoughts_is_a_thought(self) -> None:
        text = f"<think>I could {said('hermes')}</think>\n{said('hermes')}"
        pieces = assert_cuts_change_nothing("hermes", text, thinking=THINK)
        assert pieces == [Reasoning(text=f"I could {said('hermes')}"), *BOTH]

    def test_special_marks(self) -> None:
        [row] = [row for row in THINKING if row.open == "[THINK]"]
        hidden = (row.open, row.close)
        text = spelled("[THINK]hm[/THINK]Hi", hidden)
        pieces = assert_cuts_change_nothing(None, text, thinking=row, hidden=hidden)
        assert pieces == [Reasoning(text="hm"), Text(text="Hi")]


_PARTS = [
    *("<tool_call>", "</tool_call>", "\n", " ", '{"name": "now", ', '"arguments": ', "{", "}", '"'),
    *("[", "]", ",", ":", "1", "a", "\\", "<|python_tag|>", ";", '{"a": 1}', "<think>", "</think>"),
    *("[TOOL_CALLS]", "now", "[ARGS]", "<function=now>", "<parameter=x>", "</parameter>"),
    *("</function>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.now:0"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
]
_parts = st.lists(st.sampled_from(_PARTS), max_size=14)


@settings(deadline=None, derandomize=True, max_examples=600)
@given(
    parts=_parts,
    family=st.sampled_from(sorted(BY_NAME)),
    think=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_anything_is_read_and_cuts_change_nothing(
    parts: list[str], family: str, think: bool, rng: random.Random
) -> None:
    text = "".join(parts)
    about = {"thinking": THINK if think else None}
    whole = read(family, text, **about)
    assert read(family, *parts, **about) == whole
    assert read(family, *cut(text, rng), **about) == whole
    for call in gather(whole).calls:
        assert not call.whole or isinstance(json.loads(call.arguments), dict)
