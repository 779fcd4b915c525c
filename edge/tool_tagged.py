"""Parameters that a model writes as bare text between tags, made into JSON by the tool's schema.

Pure; knows no tags. Without a type in the schema what is JSON is taken as such, else as a text.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

_PYTHON = {"None": "null", "True": "true", "False": "false"}  # as models write them, too


def read_as(schema: dict[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a parameter may have; empty: nobody says."""
    properties = schema.get("properties")
    return _kinds(properties.get(key) if isinstance(properties, dict) else None)


def _kinds(one: Any) -> frozenset[str]:
    if not isinstance(one, dict):
        return frozenset()
    kind = one.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(name for name in kind if isinstance(name, str))
    choices = one.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(it, str) for it in choices):
        return frozenset({"string"})
    either = one.get("anyOf") or one.get("oneOf")  # as Pydantic spells what may be null
    if not isinstance(either, list):
        return frozenset()
    each = [_kinds(it) for it in either]
    return frozenset().union(*each) if all(each) else frozenset()


def quoted(text: str) -> str:
    """Part of a text as it stands inside a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def literal(text: str, kinds: frozenset[str]) -> str:
    """A whole parameter as JSON: of one of `kinds` where it can be read so, else a string."""
    stripped = text.strip()
    stripped = _PYTHON.get(stripped, stripped)
    try:
        value = msgspec.json.decode(stripped)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if "string" in kinds and not (value is None and "null" in kinds):
        return json.dumps(text, ensure_ascii=False)
    return stripped
