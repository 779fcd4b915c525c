"""Anthropic's Messages, `POST /ai/v1/messages`: what a client asks, and how it is refused.

Pure: bytes to `Ask`, `Failure` to bytes. `anthropic_answer` spells the rest. Knows no HTTP, no
model. Extended thinking is accepted, and is for the model to do.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge import envelope, options
from edge.anthropic_turns import system, turns
from edge.ask import Ask
from edge.checks import BadField, Fields, as_fields, read
from edge.like_chat import chosen
from routing.errors import Code, Failure

_THEIRS = {
    "/function/parameters": "/input_schema",
    "/function/": "/",
    "/response_format/json_schema": "/output_config/format",
    "/response_format": "/output_config/format",
    "/reasoning_effort": "/output_config/effort",
}
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

# `error.type`; what is not here is the client's to mend.
_ERROR_TYPES = {
    Code.UNKNOWN_MODEL: "not_found_error",
    Code.NO_ROUTE: "not_found_error",
    Code.NOT_FOUND: "not_found_error",
    Code.UNAUTHENTICATED: "authentication_error",
    Code.TOO_LARGE: "request_too_large",
    Code.TIMEOUT: "timeout_error",
    Code.ABORTED: "timeout_error",
    Code.NO_CAPACITY: "rate_limit_error",
    Code.RATE_LIMITED: "rate_limit_error",
    Code.QUOTA: "rate_limit_error",
    Code.UNAVAILABLE: "overloaded_error",
    Code.LOST: "overloaded_error",
    Code.DRAINING: "overloaded_error",
    Code.STALE_TOKENIZER: "overloaded_error",
    Code.INCOMPATIBLE: "overloaded_error",
    Code.INTERNAL: "api_error",
}


def parse(body: bytes) -> Ask:
    """What the client asks; raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    fields.need("model", "max_tokens", "messages")
    return _ask(fields)


def parse_count(body: bytes) -> Ask:
    """Of `.../count_tokens`: a prompt whose tokens are to be counted."""
    fields = read(body)
    fields.need("model", "messages")
    return _ask(fields)


def error(failure: Failure) -> bytes:
    """The JSON body of a refusal; its status is `failure.code.meaning.status`."""
    return msgspec.json.encode(error_object(failure))


def error_object(failure: Failure) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(failure.code, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": envelope.message(failure)}}


def _ask(fields: Fields) -> Ask:
    model = fields.text("model")
    if not model:
        raise BadField("/model", "Length of '/model' must be >= 1, got 0")
    return Ask(
        model=model,
        messages=(*system(fields), *turns(fields)),
        stream=fields.flag("stream") or False,
        stops=options.stops(fields, "stop_sequences"),
        sampling=options.sampling(fields, options.ANTHROPIC),
        **chosen(_like_chat(fields), _THEIRS),
    )


def _like_chat(fields: Fields) -> Fields:
    """Tools and format as chat completions have them."""
    given = fields.array("tools") or []
    at = fields.at("tools")
    tools = [_tool(as_fields(f"{at}/{index}", tool)) for index, tool in enumerate(given)]
    choice, parallel = _choice(fields)
    return Fields(
        dict(fields.items())
        | {
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": parallel,
            "response_format": _format(fields),
            "reasoning_effort": _effort(fields),
        }
    )


def _format(fields: Fields) -> dict[str, Any] | None:
    config = fields.fields("output_config")
    form = None if config is None else config.fields("format")
    if form is None:
        return None
    form.need("type")
    if form.text("type") != "json_schema":
        says = f"'{form.at('type')}' must be 'json_schema'"
        raise BadField(form.at("type"), says)
    form.need("schema")
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": form.value("schema")},
    }


def _tool(tool: Fields) -> dict[str, Any]:
    kind = tool.text("type")
    if kind not in {None, "custom"}:
        says = f"'{tool.at('type')}': only 'custom' tools are supported by this deployment"
        raise BadField(tool.at("type"), says)
    tool.need("name", "input_schema")
    schema = tool.fields("input_schema")
    assert schema is not None
    function: dict[str, Any] = {"name": tool.text("name"), "parameters": dict(schema.items())}
    if (description := tool.text("description")) is not None:
        function["description"] = description
    if (strict := tool.flag("strict")) is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def _choice(fields: Fields) -> tuple[Any, bool | None]:
    """`tool_choice` as chat completions have it, and whether calls may be several."""
    choice = fields.fields("tool_choice")
    if choice is None:
        return None, None
    choice.need("type")
    parallel = choice.flag("disable_parallel_tool_use") is not True
    kind = choice.text("type")
    if kind == "tool":
        choice.need("name")
        return {"type": "function", "function": {"name": choice.text("name")}}, parallel
    if kind not in _CHOICES:
        allowed = ", ".join(f"'{name}'" for name in (*_CHOICES, "tool"))
        raise BadField(choice.at("type"), f"'{choice.at('type')}' must be one of {allowed}")
    return _CHOICES[kind], parallel


def _effort(fields: Fields) -> str | None:
    """How much thinking is asked for, where that is said: a budget of tokens says nothing here."""
    config = fields.fields("output_config")
    effort = None if config is None else config.text("effort")
    thinking = fields.fields("thinking")
    if thinking is None:
        return effort
    thinking.need("type")
    if thinking.text("type") == "disabled":
        return "none"
    if thinking.text("type") not in _THINKING:
        allowed = ", ".join(f"'{name}'" for name in _THINKING)
        raise BadField(thinking.at("type"), f"'{thinking.at('type')}' must be one of {allowed}")
    return effort
