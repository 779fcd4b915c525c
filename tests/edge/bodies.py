"""What the tests of both APIs send: bodies by field, and what refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from edge.ask import Ask
from edge.checks import BadField
from routing.errors import Code, Failure

Parse = Callable[[bytes], Ask]

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}

# Any JSON, and JSON that is nearly a request.
_FIELDS = [
    *["prompt", "messages", "model", "stream", "raw", "temperature", "top_p", "top_k", "seed"],
    *["max_tokens", "max_completion_tokens", "stop", "logit_bias", "logprobs", "top_logprobs"],
    *["tools", "tool_choice", "functions", "response_format", "lora", "n", "options", "role"],
    *["content", "type", "text", "tool_calls", "function", "name", "arguments", "stream_options"],
    *["include_usage", "speculative", "ignore_eos", "json_schema", "schema", "guided_json"],
    *["guided_regex", "guided_choice", "guided_grammar"],
]
_words = st.sampled_from(["user", "assistant", "text", "none", "auto", "", "0", "🙂"])
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _words
anything: st.SearchStrategy[Any] = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(_FIELDS) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=20,
)
nearly_a_request = st.dictionaries(st.sampled_from(_FIELDS), anything, max_size=8).map(
    lambda body: {**HELLO, "model": "m"} | body
)


REFUSALS = {Code.BAD_INPUT, Code.NO_ADAPTERS}


def refused(parse: Parse, body: bytes | dict[str, Any]) -> BadField:
    """The refusal of a body; fails when it is accepted."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadField) as caught:
        parse(data)
    assert caught.value.code in REFUSALS
    assert caught.value.detail.startswith("AiError: Bad input: Error: ")
    return caught.value


def outcome(parse: Parse, body: bytes) -> Ask | Failure:
    """What becomes of a body. Anything but a Failure that is raised is a bug."""
    try:
        return parse(body)
    except Failure as failure:
        return failure
