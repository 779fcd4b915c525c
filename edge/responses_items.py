"""Items of OpenAI's Responses, as a client sends them and as chat templates take them. Pure.

An item here is what the API lists: a dict with `type`, of which `message`, `function_call`,
`function_call_output`, `reasoning` and `item_reference` are known. Knows no request and no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.ask import Message
from edge.checks import BadField, Fields, as_fields, mismatch, required
from edge.messages import arguments_of

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def items(body: Fields) -> tuple[Item, ...]:
    """`input`: a text of the user's, or items; checked, and each of one shape."""
    given = body.value("input")
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return ({"type": "message", "role": "user", "content": content},)
    if not isinstance(given, list):
        raise mismatch(body.at("input"), given, "string", "array")
    at = body.at("input")
    return tuple(_item(as_fields(f"{at}/{index}", item)) for index, item in enumerate(given))


def conversation(instructions: str | None, given: Sequence[Item]) -> tuple[Message, ...]:
    """The turns that items make. A call and the thoughts before it are one turn of the model's."""
    turns: list[Message] = []
    for item in given:
        match item["type"]:
            case "message":
                _say(turns, item)
            case "reasoning":
                _think(turns, _texts(item["content"] or item["summary"]))
            case "function_call":
                _of_model(turns).setdefault("tool_calls", []).append(_call(item))
            case "function_call_output":
                told = {"content": _texts(item["output"]), "tool_call_id": item["call_id"]}
                turns.append({"role": "tool", **told})
    return (*_instructed(instructions, turns), *turns)


def _instructed(instructions: str | None, turns: list[Message]) -> list[Message]:
    """Instructions go first; with a system message that is there already, for many templates take
    one only."""
    if not instructions:
        return []
    if turns and turns[0]["role"] == "system":
        instructions = f"{instructions}\n\n{turns.pop(0)['content']}"
    return [{"role": "system", "content": instructions}]


def _say(turns: list[Message], item: Item) -> None:
    role, text = item["role"], _texts(item["content"])
    if role == "assistant":
        last = turns[-1] if turns else {}
        if last.get("role") == "assistant" and not (last["content"] or last.get("tool_calls")):
            last["content"] = text  # after its thoughts
            return
    turns.append({"role": "system" if role == "developer" else role, "content": text})


def _think(turns: list[Message], text: str) -> None:
    if text:
        turn = _of_model(turns)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text


def _of_model(turns: list[Message]) -> Message:
    """The model's turn that goes on, else a new one."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _call(item: Item) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": arguments_of("", item["arguments"])}
    return {"type": "function", "function": function, "id": item["call_id"]}


def _texts(content: str | Sequence[Item]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _item(item: Fields) -> Item:
    kind = item.text("type") or ("message" if item.has("role") else "item_reference")
    read = _READ.get(kind)
    if read is None:
        known = ", ".join(f"'{name}'" for name in _READ)
        raise BadField(item.at("type"), f"'{item.at('type')}' must be one of {known}")
    known_id = item.text("id")
    return {"type": kind} | ({} if known_id is None else {"id": known_id}) | read(item)


def _message(item: Fields) -> Item:
    item.need("role", "content")
    role = item.text("role")
    if role not in _ROLES:
        allowed = ", ".join(f"'{name}'" for name in _ROLES)
        raise BadField(item.at("role"), f"'{item.at('role')}' must be one of {allowed}")
    content = _content(item, "content", "output_text" if role == "assistant" else "input_text")
    return {"role": role, "status": "completed", "content": content}


def _content(item: Fields, name: str, kind: str) -> list[Item]:
    """Parts of `kind`; a text is one of them."""
    given = item.value(name)
    if isinstance(given, str):
        return [_part(kind, given)]
    if not isinstance(given, list):
        raise mismatch(item.at(name), given, "string", "array")
    at = item.at(name)
    return [_part(kind, _text(as_fields(f"{at}/{n}", part))) for n, part in enumerate(given)]


def _part(kind: str, text: str) -> Item:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _text(part: Fields) -> str:
    part.need("type")
    member = _TEXTS.get(part.text("type") or "")
    if member is None:
        says = f"'{part.at('type')}': only text parts are supported by this model"
        raise BadField(part.at("type"), says)
    text = part.text(member)
    if text is None:
        raise BadField(part.at(member), required(part.at(), member))
    return text


def _function_call(item: Fields) -> Item:
    item.need("call_id", "name", "arguments")
    arguments_of(item.at("arguments"), item.text("arguments"))
    said = {name: item.text(name) for name in ("call_id", "name", "arguments")}
    return said | {"status": "completed"}


def _function_call_output(item: Fields) -> Item:
    item.need("call_id", "output")
    output = item.value("output")
    if not isinstance(output, str):
        output = _content(item, "output", "input_text")
    return {"call_id": item.text("call_id"), "output": output, "status": "completed"}


def _reasoning(item: Fields) -> Item:
    """Thoughts of an earlier turn. What is encrypted was made elsewhere, and is left out."""
    thoughts = {}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        at, given = item.at(name), item.array(name) or []
        parts = [as_fields(f"{at}/{index}", part) for index, part in enumerate(given)]
        thoughts[name] = [{"type": kind, "text": part.text("text") or ""} for part in parts]
    return thoughts


def _item_reference(item: Fields) -> Item:
    item.need("id")
    return {}


_READ = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
    "item_reference": _item_reference,
}
