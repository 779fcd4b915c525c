"""What an answer must look like, as clients of either API say it. Pure.

`response_format` is OpenAI's and Workers AI's: the schema bare, as Workers AI documents it, or in
OpenAI's envelope. `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar` are vLLM's.
Whether a schema or an expression can be followed is the engine's to say: it compiles them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edge.checks import BadField, Fields, mismatch, shown
from routing.wire import Grammar

MOST_CHARS = 64 << 10  # of a schema as JSON, an expression, a grammar, and choices
_MOST_DEPTH = 64  # of arrays and objects in each other
MOST_CHOICES = 1024
_FORMAT = "response_format"
# Members of OpenAI's envelope. `schema` is no keyword of JSON Schema; the others are, or may be.
_ENVELOPE = frozenset({"name", "description", "schema", "strict"})


def asked(body: Fields) -> tuple[Grammar | None, str]:
    """What the answer must match, and the pointer of what says so; None and "" for any text.

    Empty values ask for nothing. Raises Failure(BAD_INPUT) naming the field that is wrong.
    """
    found = {}
    for name, read in _READERS.items():
        if (grammar := read(body, name)) is not None:
            found[name] = grammar
    if len(found) > 1:
        first, second, *_ = found
        says = f"'{body.at(second)}' cannot be met together with '{body.at(first)}'"
        raise BadField(body.at(second), says)
    if not found:
        return None, ""
    [(name, grammar)] = found.items()
    has_schema = name == _FORMAT and grammar.kind == "json_schema"
    return grammar, body.at(name) + ("/json_schema" if has_schema else "")


def is_json(asked: Grammar | None) -> bool:
    """Whether the whole answer is JSON."""
    return asked is not None and asked.kind in {"json_object", "json_schema"}


def _response_format(body: Fields, name: str) -> Grammar | None:
    form = body.fields(name)
    if form is None:
        return None
    form.need("type")
    match form.text("type"):
        case "text":
            return None
        case "json_object" if not form.value("json_schema"):
            return Grammar("json_object", "")
        case "json_object" | "json_schema":
            form.need("json_schema")
            inner = form.fields("json_schema")
            assert inner is not None
            return _of_schema(*_bare(inner))
        case other:
            at = form.at("type")
            kinds = "'text', 'json_object', 'json_schema'"
            raise BadField(at, f"'{at}' must be one of {kinds}, got '{shown(other)}'")


def _bare(given: Fields) -> tuple[str, dict[str, Any]]:
    """A schema and where it is: without its envelope."""
    members = dict(given.items())
    if isinstance(members.get("schema"), dict):
        return given.at("schema"), members["schema"]
    if members.get("name") is not None and members.keys() <= _ENVELOPE:
        given.need("schema")
        raise mismatch(given.at("schema"), members["schema"], "object")
    return given.at(), members


def _guided_json(body: Fields, name: str) -> Grammar | None:
    value, at = body.value(name), body.at(name)
    if value in (None, "", {}):
        return None
    if isinstance(value, str):
        _check_length(at, value)
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as malformed:
            raise BadField(at, f"'{at}' is not valid JSON: {malformed}") from None
    if not isinstance(value, dict):
        raise mismatch(at, value, "object", "string")
    return _of_schema(at, value)


def _guided_choice(body: Fields, name: str) -> Grammar | None:
    choices, at = body.array(name), body.at(name)
    if not choices:
        return None
    if len(choices) > MOST_CHOICES:
        raise BadField(at, f"'{at}' must have <= {MOST_CHOICES} items, got {len(choices)}")
    for n, text in enumerate(choices):
        if not isinstance(text, str):
            raise mismatch(f"{at}/{n}", text, "string")
        if not text:
            raise BadField(f"{at}/{n}", f"Length of '{at}/{n}' must be >= 1, got 0")
    return Grammar("choice", _encoded(at, choices))


def _guided_regex(body: Fields, name: str) -> Grammar | None:
    text = _text(body, name)
    return Grammar("regex", text) if text else None


def _guided_grammar(body: Fields, name: str) -> Grammar | None:
    text = _text(body, name)
    return Grammar("lark", text) if text else None


_READERS: Mapping[str, Callable[[Fields, str], Grammar | None]] = {
    _FORMAT: _response_format,
    "guided_json": _guided_json,
    "guided_regex": _guided_regex,
    "guided_choice": _guided_choice,
    "guided_grammar": _guided_grammar,
}


def _text(body: Fields, name: str) -> str:
    text = body.text(name) or ""
    _check_length(body.at(name), text)
    return text


def _of_schema(at: str, schema: dict[str, Any]) -> Grammar:
    if _is_deeper(schema, _MOST_DEPTH):
        raise BadField(at, f"'{at}' is nested more than {_MOST_DEPTH} levels deep")
    return Grammar("json_schema", _encoded(at, schema))


def _encoded(at: str, value: Any) -> str:
    """JSON in ASCII, members in the client's order: it is the order of the answer's."""
    source = json.dumps(value, separators=(",", ":"))
    _check_length(at, source)
    return source


def _check_length(at: str, text: str) -> None:
    if len(text) > MOST_CHARS:
        raise BadField(at, f"Length of '{at}' must be <= {MOST_CHARS}, got {len(text)}")


def _is_deeper(value: Any, most: int) -> bool:
    """Whether there is a value inside more than so many others. Level by level: no recursion."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
