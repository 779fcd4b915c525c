"""The scanner against Python's own parser: what is JSON, where it ends, what comes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.json_scan import JsonScan

_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _FLOATS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


def scanned(text: str) -> tuple[JsonScan, str, int]:
    """Character by character, as it would come."""
    scan, made, at = JsonScan(), "", 0
    for end in range(1, len(text) + 1):
        while at < end and not (scan.done or scan.broken):
            told, at = scan.push(text[:end], at)
            made += told
    return scan, made, at


@settings(deadline=None, derandomize=True, max_examples=300)
@given(value=_JSON, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_value_ends_where_it_ends(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    scan, made, at = scanned(text + "}rest")
    assert scan.done
    assert (made, at) == (text, len(text))


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    value=_JSON,
    at=st.integers(0, 60),
    wrong=st.sampled_from([*'{}[],:"\\ \n0-.eE+atfnu/x', "", "01", "\\u12", "\\x"]),
)
def test_what_is_no_json_breaks(value: Any, at: int, wrong: str) -> None:
    text = "[" + json.dumps(value, ensure_ascii=False) + "]"
    text = text[:at] + wrong + text[at + 1 :]
    scan, made, end = scanned(text)
    try:
        whole = json.loads(text, strict=False)
    except json.JSONDecodeError:
        assert not (scan.done and end == len(text))
    else:
        assert scan.done or end == len(text)
        if isinstance(whole, list | dict | str) and scan.done:
            assert json.loads(made) == whole


@pytest.mark.parametrize(
    "text", ['{"a" 1', "[1,]", '{"a": 1,}', "[01]", '["\\x', '["\\u00g', "{1", "[}"]
)
def test_it_breaks_at_the_character_that_cannot_follow(text: str) -> None:
    scan, _, at = scanned(text)
    assert scan.broken
    assert at == len(text) - 1


def test_line_breaks_in_texts_are_escaped() -> None:
    scan, made, _ = scanned('["a\nb\tc\x01"]')
    assert scan.done
    assert made == '["a\\nb\\tc\\u0001"]'
