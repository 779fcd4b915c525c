"""Fields of text generation: natively, in chats and in completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.clients.fields import (
    HELLO,
    NOBODY,
    Route,
    calls,
    choices,
    grammar,
    is_stream,
    reads,
    rows,
    said,
    sampling,
)
from tests.fakes.counting_region import MODEL

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
WEATHER = {"name": "weather", "description": "-", "parameters": SCHEMA}
CLOCK = {"name": "clock", "description": "-", "parameters": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [{"type": "function", "function": it} for it in (WEATHER, CLOCK)]
ONE = {"type": "function", "function": {"name": "clock"}}
NUMBERS: Mapping[str, float] = {
    "max_tokens": 3,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "seed": 11,
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.75,
    "presence_penalty": 0.375,
}
_ALL: tuple[Route, ...] = ("run", "chat", "completions")
_TALK: tuple[Route, ...] = ("run", "chat")
_V1: tuple[Route, ...] = ("chat", "completions")

_SAMPLING = [
    row
    for name, value in NUMBERS.items()
    for row in rows(_ALL, name, {name: value}, sampling(name), value)
]
_COMMON = [
    *rows(_ALL, "stream", {"stream": True}, is_stream, True),
    *rows(
        _ALL,
        "max_completion_tokens",
        {"max_completion_tokens": 3},
        sampling("max_tokens"),
        3,
        drops=("max_tokens",),
    ),
    *rows(_ALL, "logit_bias", {"logit_bias": {"66": -5}}, sampling("logit_bias"), ((66, -5.0),)),
    *rows(_ALL, "response_format", {"response_format": FORMAT}, grammar, "json_schema"),
    *rows(_ALL, "guided_json", {"guided_json": SCHEMA}, grammar, "json_schema"),
    *rows(_ALL, "guided_regex", {"guided_regex": "[A-Z]+"}, grammar, "regex"),
    *rows(_ALL, "guided_choice", {"guided_choice": ["AB", "CD"]}, grammar, "choice"),
    *rows(_ALL, "guided_grammar", {"guided_grammar": 'start: "A"'}, grammar, "lark"),
    *rows(_ALL, "speculative", {"speculative": False}, sampling("speculate"), False),
    *rows(_ALL, "ignore_eos", {"ignore_eos": True}, sampling("stop_ids"), ()),
    *rows(
        _ALL,
        "options",
        {"options": {"rejectIfBusy": True}},
        lambda heard: heard.asked[-1].reject_if_busy,
        True,
    ),
]
_CHAT = [
    *rows(_TALK, "messages", {"messages": HELLO}, reads("user hello"), ["user hello"]),
    *rows(_TALK, "tools", {"tools": TOOLS}, reads("weather", "clock"), ["weather", "clock"]),
    *rows(_TALK, "tool_choice", {"tools": TOOLS, "tool_choice": ONE}, calls, (["clock"], False)),
    *rows(
        _TALK,
        "parallel_tool_calls",
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
        calls,
        (["weather", "clock"], False),
    ),
    *rows(_TALK, "reasoning_effort", {"reasoning_effort": "high"}, reads("high"), ["high"]),
    *rows(
        _TALK,
        "chat_template_kwargs",
        {"chat_template_kwargs": {"mood": "merry"}},
        reads("merry"),
        ["merry"],
    ),
]
_NATIVE = [
    *rows("run", "stop", {"stop": "C", "max_tokens": 9}, said("response"), "AB", of_answer=True),
    *rows("run", "prompt", {"prompt": "hi"}, reads("user hi"), ["user hi"], drops=("messages",)),
    *rows(
        "run",
        "raw",
        {"prompt": "K", "raw": True},
        said("response"),
        "LM",
        drops=("messages",),
        of_answer=True,
    ),
]
_OPENAI = [
    *rows(_V1, "model", {"model": MODEL}, said("model"), MODEL, of_answer=True),
    *rows(
        _V1,
        "models",
        {"model": NOBODY, "models": [MODEL]},
        said("model"),
        MODEL,
        of_answer=True,
    ),
    *rows(
        _V1,
        "stop",
        {"stop": ["C"], "max_tokens": 9},
        choices("finish_reason"),
        ["stop"],
        of_answer=True,
    ),
    *rows(_V1, "n", {"n": 2}, choices("index"), [0, 1], of_answer=True),
    *rows(
        _V1,
        "stream_options",
        {"stream": True, "stream_options": {"include_usage": True}},
        said(-1, "usage", "completion_tokens"),
        2,
        of_answer=True,
    ),
    *rows(
        "chat",
        "logprobs",
        {"logprobs": True},
        choices("logprobs", "content", 0, "token"),
        ["A"],
        of_answer=True,
    ),
    *rows(
        "chat",
        "top_logprobs",
        {"logprobs": True, "top_logprobs": 2},
        choices("logprobs", "content", 0, "top_logprobs", 1, "token"),
        ["B"],
        of_answer=True,
    ),
]
_COMPLETIONS = [
    *rows(
        "completions",
        "prompt",
        {"prompt": ["A", "K"]},
        choices("text"),
        ["BC", "LM"],
        of_answer=True,
    ),
    *rows(
        "completions", "best_of", {"n": 2, "best_of": 2}, choices("index"), [0, 1], of_answer=True
    ),
    *rows(
        "completions",
        "logprobs",
        {"logprobs": 1},
        choices("logprobs", "tokens"),
        [["B", "C"]],
        of_answer=True,
    ),
    *rows("completions", "echo", {"echo": True}, choices("text"), ["ABC"], of_answer=True),
]
GENERATION = [*_CHAT, *_NATIVE, *_OPENAI, *_COMPLETIONS, *_COMMON, *_SAMPLING]
