"""What an answer must look like, as each client spells it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import openai, workers_ai
from edge.ask import Ask, End, Text, Usage
from edge.workers_ai import Answer
from routing.wire import Grammar
from tests.edge.bodies import HELLO, refused

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
AS_SENT = Grammar("json_schema", json.dumps(SCHEMA, separators=(",", ":")))
END = End(reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))


def native(body: bytes) -> Ask:
    return workers_ai.parse(body, "m")


def format_of(**fields: Any) -> Grammar | None:
    """What both APIs make of these fields."""
    body = json.dumps({**HELLO, "model": "m", **fields}).encode()
    asked = native(body).grammar
    assert openai.parse(body).grammar == asked
    return asked


def deep(count: int) -> dict[str, Any]:
    """Objects in each other."""
    schema: dict[str, Any] = {}
    for _ in range(count - 1):
        schema = {"not": schema}
    return schema


class TestResponseFormat:
    @pytest.mark.parametrize("form", [None, {"type": "text"}, {"type": "text", "json_schema": {}}])
    def test_text_is_any_text(self, form: Any) -> None:
        assert format_of(response_format=form) is None

    def test_a_json_object(self) -> None:
        assert format_of(response_format={"type": "json_object"}) == Grammar("json_object", "")

    @pytest.mark.parametrize(
        "schema",
        [
            SCHEMA,
            {"name": "x", "schema": SCHEMA},
            {"name": "x", "schema": SCHEMA, "strict": True, "description": "d"},
            {"schema": SCHEMA},
        ],
    )
    def test_a_schema_comes_bare_or_in_openais_envelope(self, schema: Any) -> None:
        """With its members in the client's order."""
        for kind in ("json_schema", "json_object"):
            form = {"type": kind, "json_schema": schema}
            assert format_of(response_format=form) == AS_SENT

    def test_a_bare_schema_may_have_a_property_called_schema(self) -> None:
        bare = {"type": "object", "properties": {"schema": {"type": "object"}, "name": {}}}
        form = format_of(response_format={"type": "json_schema", "json_schema": bare})
        assert form is not None
        assert json.loads(form.source) == bare

    @pytest.mark.parametrize(
        ("form", "pointer"),
        [
            ("text", "/response_format"),
            ({}, "/response_format/type"),
            ({"type": 1}, "/response_format/type"),
            ({"type": "regex", "regex": "a"}, "/response_format/type"),
            ({"type": "json_schema"}, "/response_format/json_schema"),
            ({"type": "json_schema", "json_schema": "{}"}, "/response_format/json_schema"),
            ({"type": "json_schema", "json_schema": True}, "/response_format/json_schema"),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "strict": True}},
                "/response_format/json_schema/schema",
            ),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}},
                "/response_format/json_schema/schema",
            ),
            ({"type": "json_schema", "json_schema": deep(66)}, "/response_format/json_schema"),
            (
                {"type": "json_schema", "json_schema": {"const": "x" * 65_536}},
                "/response_format/json_schema",
            ),
        ],
    )
    def test_others_are_refused_by_name(self, form: Any, pointer: str) -> None:
        assert refused(native, HELLO | {"response_format": form}).pointer == pointer

    def test_a_schema_may_be_65_levels_deep(self) -> None:
        form = format_of(response_format={"type": "json_schema", "json_schema": deep(65)})
        assert form is not None
        assert json.loads(form.source) == deep(65)


class TestGuided:
    def test_a_schema_as_object_or_text(self) -> None:
        assert format_of(guided_json=SCHEMA) == AS_SENT
        assert format_of(guided_json=json.dumps(SCHEMA)) == AS_SENT

    def test_the_others(self) -> None:
        assert format_of(guided_regex="[ab]+") == Grammar("regex", "[ab]+")
        assert format_of(guided_choice=["é", "n"]) == Grammar("choice", '["\\u00e9","n"]')
        assert format_of(guided_grammar='start: "a"') == Grammar("lark", 'start: "a"')

    @pytest.mark.parametrize("nothing", [None, "", {}, []])
    def test_nothing_asks_for_nothing(self, nothing: Any) -> None:
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            kinds = {"guided_json": (str, dict), "guided_choice": (list,)}.get(name, (str,))
            if nothing is None or isinstance(nothing, kinds):
                assert format_of(**{name: nothing}) is None

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"guided_json": [1]}, "/guided_json"),
            ({"guided_json": "{"}, "/guided_json"),
            ({"guided_json": "[]"}, "/guided_json"),
            ({"guided_json": "[" * 50_000}, "/guided_json"),
            ({"guided_json": deep(66)}, "/guided_json"),
            ({"guided_regex": 1}, "/guided_regex"),
            ({"guided_regex": "a" * 65_537}, "/guided_regex"),
            ({"guided_choice": "a"}, "/guided_choice"),
            ({"guided_choice": ["a", 1]}, "/guided_choice/1"),
            ({"guided_choice": ["a", ""]}, "/guided_choice/1"),
            ({"guided_choice": ["a"] * 1025}, "/guided_choice"),
            ({"guided_grammar": {}}, "/guided_grammar"),
        ],
    )
    def test_others_are_refused_by_name(self, fields: Any, pointer: str) -> None:
        assert refused(native, HELLO | fields).pointer == pointer

    def test_two_at_once_are_refused(self) -> None:
        both = {"guided_regex": "a", "response_format": {"type": "json_object"}}
        failure = refused(native, HELLO | both)
        assert failure.pointer == "/guided_regex"
        assert "'/response_format'" in failure.detail
        text = {"guided_regex": "a", "response_format": {"type": "text"}}
        assert format_of(**text) == Grammar("regex", "a")


class TestWholeAnswers:
    @staticmethod
    def response(*texts: str, is_json: bool) -> Any:
        answer = Answer(is_json=is_json).whole([Text(text=text) for text in texts], END)
        return msgspec.json.decode(answer)["result"]["response"]

    def test_json_that_was_asked_for_is_no_text(self) -> None:
        assert self.response('{"a": ', "1.0}", is_json=True) == {"a": 1.0}
        assert self.response('{"a": ', "1.0}", is_json=False) == '{"a": 1.0}'

    def test_json_keeps_its_digits(self) -> None:
        raw = Answer(is_json=True).whole([Text(text='{"a":1.10,"b":99999999999999999999}')], END)
        assert b'"response":{"a":1.10,"b":99999999999999999999}' in raw

    @pytest.mark.parametrize("text", ["", '{"a": 1', '{"a": "\ud83d', "[" * 5000])
    def test_what_is_cut_short_stays_text(self, text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        assert self.response(text, is_json=True) == text

    @given(st.text())
    def test_any_text_is_told(self, text: str) -> None:
        told = self.response(text, is_json=True)
        assert told == text or told == json.loads(text)
