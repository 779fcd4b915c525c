"""Anthropic's conversations, made into what chat templates take. Pure.

A turn of the user's may hold results of tools, which are turns of their own to templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.ask import Message
from edge.checks import BadField, Fields, as_fields, mismatch, required
from edge.messages import arguments_of

_ROLES = ("user", "assistant", "system")
_BETWEEN = "\n\n"  # blocks of the system's text, which are paragraphs


def system(body: Fields) -> tuple[Message, ...]:
    """`system`: a text, or text blocks; the first turn to a template. None of it: no turn."""
    given = body.value("system")
    if given is None:
        return ()
    text = given if isinstance(given, str) else _BETWEEN.join(_blocks_of_text(body, "system"))
    return ({"role": "system", "content": text},) if text else ()


def turns(body: Fields) -> tuple[Message, ...]:
    """`messages`, the last of which must not be the model's: it could not go on with it."""
    given = body.array("messages") or []
    at = body.at("messages")
    if not given:
        raise BadField(at, f"'{at}' must have >= 1 items, got 0")
    made: list[Message] = []
    for index, turn in enumerate(given):
        made += _turn(as_fields(f"{at}/{index}", turn))
    if made[-1]["role"] == "assistant":
        where = f"{at}/{len(given) - 1}/role"
        says = f"'{where}': the last message must be the user's; answers cannot be begun for it"
        raise BadField(where, says)
    return tuple(made)


def _turn(turn: Fields) -> list[Message]:
    turn.need("role", "content")
    role, content = turn.text("role"), turn.value("content")
    if role not in _ROLES:
        allowed = ", ".join(f"'{name}'" for name in _ROLES)
        raise BadField(turn.at("role"), f"'{turn.at('role')}' must be one of {allowed}")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = _blocks(turn, "content")
    if role == "assistant":
        return [_model_said(blocks)]
    return _told(role, blocks)


def _model_said(blocks: Sequence[Fields]) -> Message:
    """Text, thoughts and calls of one turn. What was redacted cannot be read, and is left out."""
    message: Message = {"role": "assistant", "content": ""}
    for block in blocks:
        match block.text("type"):
            case "thinking":
                thought = message.get("reasoning_content", "") + _member(block, "thinking")
                message["reasoning_content"] = thought
            case "redacted_thinking":
                pass
            case "tool_use":
                message.setdefault("tool_calls", []).append(_call(block))
            case _:
                message["content"] += _text(block)
    return message


def _call(block: Fields) -> dict[str, Any]:
    block.need("id", "name", "input")
    block.fields("input")
    arguments = arguments_of(block.at("input"), block.value("input"))
    function = {"name": block.text("name"), "arguments": arguments}
    return {"type": "function", "function": function, "id": block.text("id")}


def _told(role: str, blocks: Sequence[Fields]) -> list[Message]:
    """Results of tools, each a turn, then the text beside them."""
    results = [_result(block) for block in blocks if block.text("type") == "tool_result"]
    texts = [_text(block) for block in blocks if block.text("type") != "tool_result"]
    return [*results, *([{"role": role, "content": "".join(texts)}] if texts else [])]


def _result(block: Fields) -> Message:
    block.need("tool_use_id")
    content = block.value("content")
    if content is None or content == []:  # as of a tool that has nothing to say
        content = ""
    elif not isinstance(content, str):
        content = "".join(_blocks_of_text(block, "content"))
    if block.flag("is_error"):
        content = f"Error: {content}"
    return {"role": "tool", "content": content, "tool_call_id": block.text("tool_use_id")}


def _blocks_of_text(owner: Fields, name: str) -> list[str]:
    return [_text(block) for block in _blocks(owner, name)]


def _blocks(owner: Fields, name: str) -> list[Fields]:
    at, given = owner.at(name), owner.value(name)
    if not isinstance(given, list):
        raise mismatch(at, given, "string", "array")
    if not given:
        raise BadField(at, f"'{at}' must have >= 1 items, got 0")
    blocks = [as_fields(f"{at}/{index}", block) for index, block in enumerate(given)]
    for block in blocks:
        block.need("type")
    return blocks


def _text(block: Fields) -> str:
    if block.text("type") != "text":
        says = f"'{block.at('type')}': this model takes no such block here"
        raise BadField(block.at("type"), says)
    return _member(block, "text")


def _member(block: Fields, name: str) -> str:
    text = block.text(name)
    if text is None:
        raise BadField(block.at(name), required(block.at(), name))
    return text
