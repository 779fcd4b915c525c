"""A conversation with tools as one model's chat template takes it. Pure; knows no tokens.

What a template does with tools nobody writes down, so it is tried out, once a template. One that
does nothing with them gets them as text, in the words that Hermes and Qwen 2.5 were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edge.ask import Message, Tool
from edge.template import ChatTemplate
from edge.tool_families import PROMPTED, Family, family_of, history_id
from routing.errors import Failure

_PROBE = Tool(name="probe_tool", description="probe", parameters={"type": "object"})
_USER: Message = {"role": "user", "content": "a"}
_SYSTEM: Message = {"role": "system", "content": "b"}
_CALL = {"type": "function"}
_XS = ("probe_one", "probe_two")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a chat template does with tools."""

    family: Family  # PROMPTED: nothing that is known here
    system: bool  # takes a system message
    text_arguments: bool  # of earlier calls: JSON as a text; else as an object
    several: bool  # shows all calls of one turn


def habits_of(template: ChatTemplate, source: str) -> Habits:
    plain = _rendered(template, [_USER], None)
    shown = _rendered(template, [_USER], as_openai([_PROBE]))
    takes_tools = shown is not None and plain != shown and _PROBE.name in shown
    text_arguments = (
        _renders_calls(template, {"x": 1}) is None
        and _renders_calls(template, '{"x": 1}') is not None
    )
    two = [json.dumps({"x": x}) if text_arguments else {"x": x} for x in _XS]
    both = _renders_calls(template, *two) or ""
    return Habits(
        family=family_of(source, takes_tools=takes_tools),
        system=_rendered(template, [_SYSTEM, _USER], None) is not None,
        text_arguments=text_arguments,
        several=all(x in both for x in _XS),
    )


def prepared(
    habits: Habits, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools as the template is to be given them."""
    if habits.family is PROMPTED:
        turns = _in_text(messages)
        return (_described(habits, turns, tools) if tools else turns), None
    turns = list(_renamed(habits, messages)) if _have_calls(messages) else list(messages)
    return turns if habits.several else _one_by_one(turns), as_openai(tools) or None


def as_openai(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """Each as OpenAI's API has it, which is what templates expect."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.parameters,
            },
        }
        for tool in tools
    ]


def _rendered(
    template: ChatTemplate, turns: list[Message], tools: list[dict[str, Any]] | None
) -> str | None:
    """None: it does not take them."""
    try:
        return template.render(turns, tools)
    except Failure:
        return None


def _renders_calls(template: ChatTemplate, *arguments: Any) -> str | None:
    """A turn with calls of these arguments, and what came of them."""
    functions = [{"name": _PROBE.name, "arguments": one} for one in arguments]
    calls = [_CALL | {"id": f"12345678{at}", "function": it} for at, it in enumerate(functions)]
    turns: list[Message] = [_USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    for call in calls:
        about = {"name": _PROBE.name, "tool_call_id": call["id"]}
        turns.append({"role": "tool", "content": "c", **about})
    return _rendered(template, turns, as_openai([_PROBE]))


def _have_calls(messages: Sequence[Message]) -> bool:
    return any(turn.get("tool_calls") or turn["role"] == "tool" for turn in messages)


def _renamed(habits: Habits, messages: Sequence[Message]) -> Iterable[Message]:
    """Calls with ids of the family's own kind, so answers to them; arguments as it has them."""
    ids: dict[str, str] = {}
    number = 0
    for turn in messages:
        calls = []
        for call in turn.get("tool_calls", ()):
            function, known = call["function"], call.get("id", f"call_{number}")
            ids[known] = history_id(habits.family, known, function["name"], number)
            arguments = function["arguments"]
            if habits.text_arguments and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append(call | {"id": ids[known], "function": function | {"arguments": arguments}})
            number += 1
        answers = turn.get("tool_call_id")
        yield (
            turn
            | ({"tool_calls": calls} if calls else {})
            | ({"tool_call_id": ids.get(answers, answers)} if answers else {})
        )


def _one_by_one(turns: Sequence[Message]) -> list[Message]:
    """Each call in a turn of its own, what came of it behind: some templates show one a turn."""
    groups: list[list[Message]] = []  # a turn, and what tools gave
    of_call: dict[str, list[Message]] = {}
    for turn in turns:
        if turn["role"] == "tool" and groups:
            of_call.get(turn.get("tool_call_id", ""), groups[-1]).append(turn)
            continue
        parted = _parted(turn)
        groups += [[one] for one in parted]
        ids = [call["id"] for one in parted for call in one.get("tool_calls", ())]
        of_call = dict(zip(ids, groups[-len(parted) :], strict=False))  # no calls: no ids
    return [turn for group in groups for turn in group]


def _parted(turn: Message) -> list[Message]:
    """A turn of the model's as turns of one call each; what else it holds is in the first."""
    if len(calls := turn.get("tool_calls", ())) < 2:
        return [turn]
    bare = {"role": turn["role"], "content": ""}
    return [(bare if at else turn) | {"tool_calls": [call]} for at, call in enumerate(calls)]


def _in_text(messages: Sequence[Message]) -> list[Message]:
    """Calls, and what came of them, for a template that knows of neither.

    All that came of one turn's calls is one turn, as Hermes has it, with what the user says then:
    many templates want turns to alternate.
    """
    turns: list[Message] = []
    follows = False  # what a tool gave
    for message in messages:
        turn = _turn_in_text(message)
        if follows and turn["role"] == "user":
            said = f"{turns[-1]['content']}\n{turn['content']}"
            turns[-1] = turns[-1] | {"content": said}
        else:
            turns.append(turn)
        follows = message["role"] == "tool"
    return turns


def _turn_in_text(turn: Message) -> Message:
    if turn["role"] == "tool":
        said = f"<tool_response>\n{turn['content']}\n</tool_response>"
        return {"role": "user", "content": said}
    if not (calls := turn.get("tool_calls")):
        return turn
    said = "\n".join([*filter(None, [turn["content"]]), *(_call_text(call) for call in calls)])
    return {"role": turn["role"], "content": said}


def _call_text(call: dict[str, Any]) -> str:
    function = call["function"]
    told = json.dumps(
        {"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False
    )
    return f"<tool_call>\n{told}\n</tool_call>"


def _described(habits: Habits, turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """With the tools in the system message; in the first one, where there can be none."""
    text = _DESCRIBED.format(
        tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in as_openai(tools))
    )
    first = turns[0]
    if first["role"] == "system" or not habits.system:
        return [first | {"content": f"{first['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


# After Qwen 2.5's chat template, which has it from Hermes 2 Pro.
_DESCRIBED = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
