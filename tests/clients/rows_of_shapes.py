"""Fields of Responses, of Messages and of embeddings, and then all that there are."""

from __future__ import annotations

import base64
import struct

from tests.clients.fields import (
    HELLO,
    NOBODY,
    PREVIOUS,
    VECTORS,
    Heard,
    Route,
    calls,
    grammar,
    is_stream,
    reads,
    rows,
    said,
    sampling,
)
from tests.clients.rows import CLOCK, GENERATION, NUMBERS, SCHEMA
from tests.fakes.counting_region import MODEL

_TOOL = {"type": "function", "strict": False, **CLOCK}
_FORMAT = {"type": "json_schema", "schema": SCHEMA}
_RESPONSES = [
    *rows("responses", "model", {"model": MODEL}, said("model"), MODEL, of_answer=True),
    *rows("responses", "input", {"input": HELLO}, reads("user hello"), ["user hello"]),
    *rows(
        "responses",
        "previous_response_id",
        {"previous_response_id": PREVIOUS, "input": "more"},
        reads("user hello", "assistant AB", "user more"),
        ["user hello", "assistant AB", "user more"],
    ),
    *rows("responses", "instructions", {"instructions": "terse"}, reads("terse"), ["terse"]),
    *rows("responses", "stream", {"stream": True}, is_stream, True),
    *rows("responses", "max_output_tokens", {"max_output_tokens": 20}, sampling("max_tokens"), 20),
    *rows("responses", "temperature", {"temperature": 0.25}, sampling("temperature"), 0.25),
    *rows("responses", "top_p", {"top_p": 0.5}, sampling("top_p"), 0.5),
    *rows("responses", "top_logprobs", {"top_logprobs": 2}, sampling("logprobs"), 2),
    *rows(
        "responses",
        "include",
        {"include": ["message.output_text.logprobs"]},
        sampling("logprobs"),
        0,
    ),
    *rows("responses", "tools", {"tools": [_TOOL]}, reads("clock"), ["clock"]),
    *rows(
        "responses",
        "tool_choice",
        {"tools": [_TOOL], "tool_choice": {"type": "function", "name": "clock"}},
        calls,
        (["clock"], False),
    ),
    *rows(
        "responses",
        "parallel_tool_calls",
        {"tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        calls,
        (["clock"], False),
    ),
    *rows(
        "responses", "text", {"text": {"format": {"name": "it", **_FORMAT}}}, grammar, "json_schema"
    ),
    *rows("responses", "reasoning", {"reasoning": {"effort": "high"}}, reads("high"), ["high"]),
    *rows("responses", "store", {"store": False}, said("store"), False, of_answer=True),
    *rows(
        "responses",
        "metadata",
        {"metadata": {"who": "me"}},
        said("metadata"),
        {"who": "me"},
        of_answer=True,
    ),
    *rows(
        "responses",
        "truncation",
        {"truncation": "disabled"},
        said("truncation"),
        "disabled",
        of_answer=True,
    ),
    *rows("responses", "user", {"user": "me"}, said("user"), "me", of_answer=True),
]
_SHAPES: tuple[Route, ...] = ("responses", "messages")
_BOTH = [
    *rows(
        _SHAPES,
        "models",
        {"model": NOBODY, "models": [MODEL]},
        said("model"),
        MODEL,
        of_answer=True,
    ),
    *rows(
        _SHAPES,
        "options",
        {"options": {"rejectIfBusy": True}},
        lambda heard: heard.asked[-1].reject_if_busy,
        True,
    ),
]
_CLOCK = {"name": "clock", "input_schema": CLOCK["parameters"]}
_ANY = {"type": "any", "disable_parallel_tool_use": True}
_MESSAGES = [
    *rows("messages", "model", {"model": MODEL}, said("model"), MODEL, of_answer=True),
    *rows("messages", "messages", {"messages": HELLO}, reads("user hello"), ["user hello"]),
    *rows("messages", "system", {"system": "terse"}, reads("system terse"), ["system terse"]),
    *rows("messages", "stream", {"stream": True}, is_stream, True),
    *rows("messages", "tools", {"tools": [_CLOCK]}, reads("clock"), ["clock"]),
    *rows(
        "messages",
        "tool_choice",
        {"tools": [_CLOCK], "tool_choice": _ANY},
        calls,
        (["clock"], False),
    ),
    *rows(
        "messages",
        "stop_sequences",
        {"stop_sequences": ["C"], "max_tokens": 9},
        said("stop_sequence"),
        "C",
        of_answer=True,
    ),
    *rows("messages", "thinking", {"thinking": {"type": "disabled"}}, reads("none"), ["none"]),
    *rows(
        "messages", "output_config", {"output_config": {"format": _FORMAT}}, grammar, "json_schema"
    ),
    *rows(
        "messages",
        "metadata",
        {"metadata": {"user_id": "me"}},
        said("usage", "output_tokens"),
        2,
        of_answer=True,
    ),
    *(
        row
        for name, value in NUMBERS.items()
        for row in rows("messages", name, {name: value}, sampling(name), value)
    ),
]


def _texts(heard: Heard) -> object:
    return [bytes(at for at in ids if at < 256).decode() for ids in heard.embeds[-1].texts]


def _pooling(heard: Heard) -> object:
    return heard.embeds[-1].pooling


def _first(heard: Heard) -> object:
    """Of the first text: the numbers of its vector, as they came."""
    vector = heard.answer["data"][0]["embedding"]
    return (
        list(struct.unpack("<3f", base64.b64decode(vector))) if isinstance(vector, str) else vector
    )


_HI = [float(sum(b"hi")), 2.0, 1.0]  # as the model of the tests has it
_EMBEDDINGS = [
    *rows("embeddings", "model", {"model": VECTORS}, said("model"), VECTORS, of_answer=True),
    *rows(
        "embeddings",
        "models",
        {"model": NOBODY, "models": [VECTORS]},
        said("model"),
        VECTORS,
        of_answer=True,
    ),
    *rows("embeddings", "input", {"input": ["a", "hi"]}, _texts, ["a", "hi"]),
    *rows(
        "embeddings",
        "encoding_format",
        {"input": "hi", "encoding_format": "base64"},
        _first,
        _HI,
        of_answer=True,
    ),
    *rows(
        "embeddings",
        "dimensions",
        {"input": "hi", "dimensions": 3, "encoding_format": "float"},
        _first,
        _HI,
        of_answer=True,
    ),
    *rows("embeddings", "pooling", {"pooling": "cls"}, _pooling, "cls"),
    *rows(
        "embeddings",
        "options",
        {"options": {"rejectIfBusy": True}},
        lambda heard: heard.embeds[-1].reject_if_busy,
        True,
    ),
    *rows(
        "embeddings",
        "user",
        {"user": "me"},
        said("usage", "prompt_tokens"),
        5,
        of_answer=True,
    ),
]
_CONTEXTS = {"query": "hi", "contexts": [{"text": "~~~~"}, {"text": "hi"}]}
_NATIVE = [
    *rows("vectors", "text", {"text": ["a", "hi"]}, _texts, ["a", "hi"]),
    *rows("vectors", "pooling", {"text": "hi", "pooling": "cls"}, _pooling, "cls"),
    *rows("vectors", "query", _CONTEXTS, _texts, ["hi", "~~~~", "hi"]),
    *rows("vectors", "contexts", _CONTEXTS, said("response", 0, "id"), 1, of_answer=True),
    *rows(
        "vectors",
        "top_k",
        {**_CONTEXTS, "top_k": 1},
        lambda heard: len(heard.answer["response"]),
        1,
        of_answer=True,
    ),
    *rows(
        "vectors",
        "options",
        {"text": "hi", "options": {"rejectIfBusy": True}},
        lambda heard: heard.embeds[-1].reject_if_busy,
        True,
    ),
]
ROWS = [*GENERATION, *_RESPONSES, *_MESSAGES, *_BOTH, *_EMBEDDINGS, *_NATIVE]
