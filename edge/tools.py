"""`tools`, `tool_choice` and `parallel_tool_calls` as clients send them, made into a `ToolAsk`.

Pure. Takes what OpenAI's, Cloudflare's and LangChain's clients send; knows no model, no template.
"""

from __future__ import annotations

import re
from typing import Any

from edge.ask import Tool, ToolAsk
from edge.checks import BadField, Fields, as_fields, mismatch, shown
from edge.messages import shallow

MOST_TOOLS = 128
NAME = "[A-Za-z0-9_.-]{1,128}"  # Anthropic's length, and that of MCP; OpenAI's is 64
_MAX_DESCRIPTION = 100_000  # characters

_MODES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}


def tools(body: Fields) -> ToolAsk:
    """What may be called and what has to be; raises Failure(BAD_INPUT) naming the field."""
    offered = _tools(body)
    parallel = body.flag("parallel_tool_calls") is not False
    mode, named = _choice(body, {tool.name for tool in offered})
    if not offered and (mode == "required" or named):
        raise BadField(body.at("tool_choice"), f"'{body.at('tool_choice')}' needs '/tools'")
    if mode == "none" or not offered:
        return ToolAsk()
    if mode == "auto":
        if named:  # only these may be called
            offered = tuple(tool for tool in offered if tool.name in named)
        return ToolAsk(offered=offered, most=None if parallel else 1)
    one = not parallel or len(named) == 1
    forced = tuple(tool.name for tool in offered if not named or tool.name in named)
    return ToolAsk(offered=offered, forced=forced, most=1 if one else None)


def refuse_tools(body: Fields) -> None:
    """Where a prompt goes to the model as it is. `tools` that may not be called ask for nothing."""
    if tools(body).offered:
        says = f"'{body.at('tools')}': calls of tools are given where there are messages"
        raise BadField(body.at("tools"), says)


def _tools(body: Fields) -> tuple[Tool, ...]:
    at, listed = body.at("tools"), body.array("tools") or []
    if len(listed) > MOST_TOOLS:
        raise BadField(at, f"'{at}' must have <= {MOST_TOOLS} items, got {len(listed)}")
    made: dict[str, Tool] = {}
    for index, one in enumerate(listed):
        tool = _tool(as_fields(f"{at}/{index}", one))
        if tool.name in made:
            says = f"'{at}/{index}': there is a tool of the name '{tool.name}' already"
            raise BadField(f"{at}/{index}", says)
        made[tool.name] = tool
    return tuple(made.values())


def _tool(entry: Fields) -> Tool:
    kind = entry.text("type")
    if kind not in (None, "function"):
        raise BadField(entry.at("type"), f"'{entry.at('type')}': only 'function' is supported")
    function = entry.fields("function") or entry
    function.need("name")
    description = function.text("description")
    if description is not None and len(description) > _MAX_DESCRIPTION:
        says = f"Length of '{function.at('description')}' must be <= {_MAX_DESCRIPTION}"
        raise BadField(function.at("description"), says)
    return Tool(
        name=_name(function),
        description=description,
        parameters=_parameters(function),
        strict=bool(function.flag("strict") or entry.flag("strict")),
    )


def _name(function: Fields) -> str:
    name = function.text("name") or ""
    if not re.fullmatch(NAME, name):
        says = f"'{function.at('name')}' must match ^{NAME}$, got '{shown(name)}'"
        raise BadField(function.at("name"), says)
    return name


def _parameters(function: Fields) -> dict[str, Any]:
    """The schema of an object: arguments are one."""
    at, schema = function.at("parameters"), function.value("parameters")
    if schema is None:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, dict):
        raise mismatch(at, schema, "object")
    kind = schema.get("type")
    if kind not in (None, "object"):
        raise BadField(f"{at}/type", f"'{at}/type' must be 'object', got '{shown(kind)}'")
    return {"type": "object"} | dict(shallow(at, schema))


def _choice(body: Fields, offered: set[str]) -> tuple[str, frozenset[str]]:
    """auto, none or required, and of which tools; no names: of all."""
    at, choice = body.at("tool_choice"), body.value("tool_choice")
    if choice is None:
        return "auto", frozenset()
    if isinstance(choice, str):
        if choice in _MODES:
            return _MODES[choice], frozenset()
        return "required", frozenset({_offered(at, choice, offered)})
    if not isinstance(choice, dict):
        raise mismatch(at, choice, "string", "object")
    return _object_choice(as_fields(at, choice), offered)


def _object_choice(choice: Fields, offered: set[str]) -> tuple[str, frozenset[str]]:
    kind = choice.text("type")
    if kind in _MODES:
        return _MODES[kind], frozenset()
    if kind == "allowed_tools":
        return _allowed(choice.fields("allowed_tools") or choice, offered)
    if kind not in (None, "function", "tool"):
        says = f"'{choice.at('type')}' must be 'function', 'auto', 'none' or 'required'"
        raise BadField(choice.at("type"), says)
    return "required", frozenset({_named(choice, offered)})


def _allowed(choice: Fields, offered: set[str]) -> tuple[str, frozenset[str]]:
    """OpenAI's choice of some of the tools."""
    mode = choice.text("mode") or "auto"
    if mode not in _MODES:
        raise BadField(choice.at("mode"), f"'{choice.at('mode')}' must be 'auto' or 'required'")
    choice.need("tools")
    at, listed = choice.at("tools"), choice.array("tools") or []
    if not listed:
        raise BadField(at, f"'{at}' must have >= 1 items, got 0")
    names = [_named(as_fields(f"{at}/{i}", one), offered) for i, one in enumerate(listed)]
    return _MODES[mode], frozenset(names)


def _named(choice: Fields, offered: set[str]) -> str:
    """{"function": {"name"}} or {"name"}."""
    function = choice.fields("function") or choice
    function.need("name")
    return _offered(function.at("name"), function.text("name") or "", offered)


def _offered(pointer: str, name: str, offered: set[str]) -> str:
    if name not in offered:
        says = f"'{pointer}': '{shown(name)}' is none of '/tools'"
        raise BadField(pointer, says)
    return name
