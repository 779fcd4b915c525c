"""A conversation as both APIs send it, made into what chat templates take. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from edge.ask import Message
from edge.checks import BadField, Fields, as_fields, mismatch, required

_MAX_DEPTH = 100  # of a tool call's arguments

# A developer's message is a system message to models that were trained before the role was named.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def messages(body: Fields) -> tuple[Message, ...] | None:
    """The conversation, content joined into one text a message; None when there is none."""
    turns = body.array("messages")
    if turns is None:
        return None
    if not turns:
        says = f"'{body.at('messages')}' must have >= 1 items, got 0"
        raise BadField(body.at("messages"), says)
    at = body.at("messages")
    return tuple(_message(as_fields(f"{at}/{index}", turn)) for index, turn in enumerate(turns))


def _message(turn: Fields) -> Message:
    turn.need("role")
    role = _ROLES.get(turn.text("role") or "")
    if role is None:
        allowed = ", ".join(f"'{name}'" for name in _ROLES)
        raise BadField(turn.at("role"), f"'{turn.at('role')}' must be one of {allowed}")
    calls = _tool_calls(turn)
    message: Message = {"role": role, "content": _content(turn, optional=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        said = turn.text(name)
        if said is not None:
            message[name] = said
    if role == "assistant" and (thought := _reasoning(turn)):
        message["reasoning_content"] = thought
    return message


def _reasoning(turn: Fields) -> str | None:
    """What the model thought in an earlier turn, by either name that clients have for it."""
    return turn.text("reasoning_content") or turn.text("reasoning")


def _content(turn: Fields, *, optional: bool) -> str:
    """A text, or text parts joined. Null only beside tool calls; templates get "" for it."""
    content = turn.value("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = enumerate(content)
        return "".join(_part(as_fields(f"{turn.at('content')}/{at}", part)) for at, part in parts)
    if content is not None:
        raise mismatch(turn.at("content"), content, "string", "array")
    if not optional:
        raise BadField(turn.at("content"), required(turn.at(), "content"))
    return ""


def _part(part: Fields) -> str:
    part.need("type")
    kind = part.text("type")
    if kind != "text":
        says = f"'{part.at('type')}': only 'text' parts are supported by this model"
        raise BadField(part.at("type"), says)
    text = part.text("text")
    if text is None:
        raise BadField(part.at("text"), required(part.at(), "text"))
    return text


def _tool_calls(turn: Fields) -> list[dict[str, Any]]:
    """Calls of an earlier turn, flat or in OpenAI's shape, in the shape that templates expect."""
    at = turn.at("tool_calls")
    calls = turn.array("tool_calls") or []
    return [_tool_call(as_fields(f"{at}/{index}", call)) for index, call in enumerate(calls)]


def _tool_call(call: Fields) -> dict[str, Any]:
    function = call.fields("function") or call
    function.need("name")
    arguments = arguments_of(function.at("arguments"), function.value("arguments"))
    made = {"name": function.text("name"), "arguments": arguments}
    known = call.text("id")
    return {"type": "function", "function": made} | ({} if known is None else {"id": known})


def arguments_of(at: str, arguments: Any) -> Any:
    """An object where it can be one: OpenAI's shape spells it as a string of JSON.

    Of nothing there are none: a call without arguments may have come as no text at all.
    """
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, dict):
        return shallow(at, arguments)
    if not isinstance(arguments, str):
        raise mismatch(at, arguments, "object", "string")
    try:
        return shallow(at, msgspec.json.decode(arguments))
    except (ValueError, RecursionError):
        return arguments


def shallow(pointer: str, value: Any) -> Any:
    """The value, if it is nested little enough for what walks it later to recurse."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        lists = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for inner in lists for one in inner if isinstance(one, dict | list)]
        if not level:
            return value
    raise BadField(pointer, f"'{pointer}' is nested more than {_MAX_DEPTH} deep")
