"""Calls that have to be made, as a grammar in llguidance's dialect of Lark. Pure.

What matches it is calls in the model's own form, of tools that were named, with arguments that
their schemas allow: `edge.reader` reads them, and they parse. A model that thinks may do so first.
Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from edge.ask import Tool, ToolAsk
from edge.thinking import Thinking
from edge.tool_families import PROMPTED, Family
from edge.tool_tagged import read_as

# As `json.dumps` writes, which is what models were shown; and no space without end.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# By any of these a schema of an object may allow more than its `properties`.
_OPEN = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "$ref",
    "$dynamicRef",
}
_OPEN |= {"allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas", "propertyNames"}
_SPACES = ("s: SPACE?", r"SPACE: /[ \n]{1,2}/")


def call_grammar(
    row: Family,
    tools: ToolAsk,
    *,
    special: Mapping[str, int],
    thinking: Thinking | None = None,
    thinks: bool = False,
    instead: str | None = None,
) -> str:
    """The grammar of an answer that calls one of `tools.forced`; without any, of one that may call
    what is offered: anywhere in its text, or `instead` of JSON that matches a schema.

    `special`: ids of the special tokens, which no text can spell. `thinks`: the prompt has begun
    the model's thoughts.
    """
    lark = _Lark(row, special)
    allowed = [it for it in tools.offered if not tools.forced or it.name in tools.forced]
    calls = [lark.call(at, tool) for at, tool in enumerate(allowed)]
    one = tools.most == 1 or row.form == "channels"  # a call there ends the answer
    further = "" if one else f" (s {lark.mark(row.next)} s call)*"
    ends = f"s {lark.mark(row.end)}" if row.end and row.form != "channels" else ""
    rest = f"s {lark.mark(row.open)}" if row.begin else ""
    first, body = lark.mark(row.first), f"{rest} s call{further} {ends}"
    if tools.forced:
        answer = f"{first} {body}"
    elif instead is not None:
        answer = f"({first} {body} | {lark.json('answer', json.loads(instead), lenient=False)})"
    else:
        answer = lark.among_text(row.first, body)
    lark.rules += [
        f"start: {lark.thoughts(thinking, begun=thinks)} {answer}",
        f"call: {' | '.join(calls)}",
        *_SPACES,
    ]
    return "\n".join(reversed(lark.rules))


def thought_grammar(schema: str, thinking: Thinking, special: Mapping[str, int]) -> str:
    """The grammar of JSON that matches `schema`, behind thoughts that the prompt has begun."""
    lark = _Lark(PROMPTED, special)
    answer = lark.json("answer", json.loads(schema), lenient=False)
    lark.rules += [
        f"start: {lark.thoughts(thinking, begun=True)} {answer}",
        *_SPACES,
    ]
    return "\n".join(reversed(lark.rules))


class _Lark:
    def __init__(self, row: Family, special: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._row = row
        self._special = special
        names = sorted(special, key=len, reverse=True)
        self._names = re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")

    def mark(self, text: str) -> str:
        """A text with special tokens in it: those by id."""
        parts = filter(None, self._names.split(text))
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part)
            for part in parts
        )

    def thoughts(self, thinking: Thinking | None, *, begun: bool) -> str:
        if thinking is None:
            return ""
        self.rules.append(f"thoughts: {self._up_to('thought', thinking.close)} s")
        return "thoughts" if begun else f"({self.mark(thinking.open)} thoughts)?"

    def among_text(self, first: str, body: str) -> str:
        """Text, in which `first` is followed by `body` wherever it comes."""
        inside = "" if first in self._special else f" & ~/(?s:.*){_escaped(first)}(?s:.*)/"
        self.rules.append(f"TEXT: /(?s:.*)/{inside}")
        return f"({self._up_to('before', first)} {body})* TEXT?"

    def call(self, at: int, tool: Tool) -> str:
        """The rule of a call of this tool, from behind `open` to `close`."""
        row, name = self._row, f"call_{at}"
        close = f"s {self.mark(row.close)}" if row.close else ""
        match row.form:
            case "object":
                members = json.dumps(f'{{"name": "{tool.name}", "{row.arguments}": ')
                body = f'{members} {self._arguments(name, tool)} "}}"'
            case "headed" | "channels":
                number = '":" /[0-9]/' if row.history_id == "numbered" else ""
                head = f"{self.mark(row.head + tool.name)} {number} {self.mark(row.neck)}"
                body = f"{head} {self._arguments(name, tool)} {self.mark(row.tail)}"
            case "tagged":
                body = self._tagged(name, tool)
        self.rules.append(f"{name}: {body} {close}")
        return name

    def _arguments(self, name: str, tool: Tool) -> str:
        """Of no other parameters than the schema names, unless it speaks of others."""
        schema = tool.parameters
        if not _OPEN & schema.keys():
            schema = {**schema, "additionalProperties": False}
        return self.json(name, schema, lenient=not tool.strict)

    def json(self, name: str, schema: Mapping[str, Any], *, lenient: bool) -> str:
        """A rule for what matches the schema; `lenient`: in whatever of it can be checked."""
        said = _WRITTEN | {"lenient": lenient}
        written = json.dumps({**schema, "x-guidance": said}, ensure_ascii=False)
        self.rules.append(f"{name}_json: %json {written}")
        return f"{name}_json"

    def _tagged(self, name: str, tool: Tool) -> str:
        row, schema = self._row, tool.parameters
        properties = schema.get("properties")
        named = properties if isinstance(properties, dict) else {}
        needed = schema.get("required")
        needed = set(needed) if isinstance(needed, list) else set()
        parts = [
            f"({self._parameter(f'{name}_{at}', tool, key)}){'' if key in needed else '?'}"
            for at, key in enumerate(named)
        ]
        head = self.mark((row.head + tool.name + row.neck).rstrip())  # space may follow anyway
        return f"{head} {' '.join(parts)} s {self.mark(row.tail)}"

    def _parameter(self, name: str, tool: Tool, key: str) -> str:
        row, schema = self._row, tool.parameters
        line = "\n" if not row.value else ""
        value = row.value and f"s {self.mark(row.value)}"
        opening = f"s {self.mark(row.key + key + row.key_end)} {value} {self.mark(line)}"
        if (choices := _choices(schema["properties"][key])) is not None:
            told = " | ".join(json.dumps(choice) for choice in choices)
            return f"{opening} ({told}) {self.mark(line + row.value_end)}"
        kinds = read_as(schema, key)
        if "string" in kinds or not kinds:
            return f"{opening} {self._up_to(name, line + row.value_end)}"
        one = schema["properties"][key]
        shared: dict[str, Any] = {at: schema[at] for at in ("$defs", "definitions") if at in schema}
        made = self.json(name, {**shared, **one}, lenient=not tool.strict)
        return f"{opening} {made} {self.mark(line + row.value_end)}"

    def _up_to(self, name: str, end: str) -> str:
        """Any text, and the mark behind it."""
        if (found := self._names.match(end)) and found[0]:
            self.rules.append(f"{name}_text: /(?s:.*)/")
            return f"{name}_text {self.mark(end)}"
        self.rules.append(f"{name}_text[lazy]: /(?s:.*){_escaped(end)}/")
        return f"{name}_text"


def _choices(schema: Any) -> Iterable[str] | None:
    """The texts of which a parameter is one."""
    choices = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(choices, list) and choices and all(isinstance(it, str) for it in choices):
        return choices
    return None


def _escaped(text: str) -> str:
    """As an expression between slashes."""
    return re.sub(r"[][.*+?(){}|^$\\/]", r"\\\g<0>", text).replace("\n", r"\n")
