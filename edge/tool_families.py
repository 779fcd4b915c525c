"""How models of each family write calls of tools: a row each, and which row a model is. Pure.

Knows no text that comes in and no API. The forms are those of the families' published chat
templates; a catalogue that knows better names the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, Literal

# In front of a special token that is spelled out for whoever reads calls: a code point that is no
# character (Unicode 23.7), so that no text forges one.
HIDDEN = "\U000fffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A call is `begin` `open` CALL `close`, further ones `between` CALL `close`, then `end`.

    Space may be between any two. CALL is by `form`:
    object   {"name": "f", "arguments": {...}}; `arguments` says how that member is called
    headed   `head` f `neck` {...} `tail`
    channels as headed, among messages that each name a channel: see `edge.channels`
    tagged   `head` f `neck`, each parameter as `key` x `key_end` `value` TEXT `value_end`, `tail`
    """

    name: str
    signs: tuple[tuple[str, ...], ...] = ()  # all of one of these are in its chat template
    form: Literal["object", "headed", "tagged", "channels"] = "object"
    arguments: str = "arguments"
    begin: str = ""
    open: str = ""
    close: str = ""
    between: str = ""  # "": by `open`
    end: str = ""
    head: str = ""
    neck: str = ""
    tail: str = ""
    key: str = ""
    key_end: str = ""
    value: str = ""  # "": a line of its own, from behind `key_end`
    value_end: str = ""
    also: str = ""  # that may be written in the head
    suffix: str = ""  # a pattern of what may follow the name there
    bare: bool = False  # a call may begin an answer without `open`
    history_id: Literal["any", "numbered", "nine"] = "any"  # ids that its template can take

    @property
    def texts(self) -> list[str]:
        """All that it writes around what is said."""
        return [getattr(self, one.name) for one in fields(self) if one.name in _WRITTEN]

    @property
    def first(self) -> str:
        """What tells that calls begin."""
        return self.begin or self.open

    @property
    def next(self) -> str:
        return self.between or self.open

    def map(self, spell: Callable[[str], str]) -> Family:
        """The same with all that it writes spelled otherwise."""
        written: dict[str, Any] = {name: spell(getattr(self, name)) for name in _WRITTEN}
        return replace(self, **written)


_WRITTEN = (
    *("begin", "open", "close", "between", "end", "head", "neck", "tail"),
    *("key", "key_end", "value", "value_end", "also"),
)


def _deepseek(name: str) -> str:
    """DeepSeek's special tokens have wide bars around their names."""
    return f"<\uff5c{name}\uff5c>"


# The template does nothing with tools: the system message describes them, as Hermes has it.
PROMPTED = Family(name="prompted", open="<tool_call>", close="</tool_call>", bare=True)

FAMILIES = (  # the first whose signs are there counts
    Family(
        name="deepseek_v3",
        signs=((_deepseek("tool▁calls▁begin"), "```json"),),
        form="headed",
        begin=_deepseek("tool▁calls▁begin"),
        open=_deepseek("tool▁call▁begin"),
        close=_deepseek("tool▁call▁end"),
        end=_deepseek("tool▁calls▁end"),
        head="function" + _deepseek("tool▁sep"),
        neck="\n```json\n",
        tail="\n```",
    ),
    Family(
        name="deepseek_v31",
        signs=((_deepseek("tool▁calls▁begin"),),),
        form="headed",
        begin=_deepseek("tool▁calls▁begin"),
        open=_deepseek("tool▁call▁begin"),
        close=_deepseek("tool▁call▁end"),
        end=_deepseek("tool▁calls▁end"),
        neck=_deepseek("tool▁sep"),
    ),
    Family(
        name="kimi_k2",
        signs=(("<|tool_calls_section_begin|>",),),
        form="headed",
        begin="<|tool_calls_section_begin|>",
        open="<|tool_call_begin|>",
        close="<|tool_call_end|>",
        end="<|tool_calls_section_end|>",
        head="functions.",
        neck="<|tool_call_argument_begin|>",
        suffix=r":\d{1,6}",
        history_id="numbered",
    ),
    Family(
        name="mistral_args",
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        form="headed",
        open="[TOOL_CALLS]",
        neck="[ARGS]",
        also="[CALL_ID]",
        suffix=r"\[CALL_ID\]\w*",
        history_id="nine",
    ),
    Family(
        name="mistral",
        signs=(("[TOOL_CALLS]",),),
        begin="[TOOL_CALLS]",
        open="[",
        between=",",
        end="]",
        history_id="nine",
    ),
    Family(
        name="qwen3_coder",
        signs=(("<tool_call>", "<function=", "<parameter="),),
        form="tagged",
        open="<tool_call>",
        close="</tool_call>",
        head="<function=",
        neck=">",
        key="<parameter=",
        key_end=">",
        value_end="</parameter>",
        tail="</function>",
    ),
    Family(
        name="glm",
        signs=(("<tool_call>", "<arg_key>", "<arg_value>"),),
        form="tagged",
        open="<tool_call>",
        close="</tool_call>",
        neck="\n",
        key="<arg_key>",
        key_end="</arg_key>",
        value="<arg_value>",
        value_end="</arg_value>",
    ),
    Family(
        name="harmony",
        signs=(("<|channel|>", "<|message|>", "<|constrain|>"),),
        form="channels",
        open="<|channel|>",
        head="commentary to=functions.",
        neck=" <|constrain|>json<|message|>",
        end="<|end|>",
        also="<|start|><|call|><|return|>",
    ),
    Family(
        name="hermes",
        signs=(("<tool_call>",),),
        open="<tool_call>",
        close="</tool_call>",
    ),
    Family(
        name="llama3",
        signs=(("<|python_tag|>",), ("<|eom_id|>",), ("<|start_header_id|>", '"parameters"')),
        arguments="parameters",
        open="<|python_tag|>",
        between=";",
        bare=True,
    ),
)
BY_NAME: Mapping[str, Family] = {row.name: row for row in (*FAMILIES, PROMPTED)}


def family_of(template: str, *, takes_tools: bool) -> Family:
    """The row of a model with this chat template.

    One that describes tools in a way that no row knows is asked for calls as if it did not.
    """
    if not takes_tools:
        return PROMPTED
    for row in FAMILIES:
        if any(all(sign in template for sign in signs) for signs in row.signs):
            return row
    return PROMPTED


def channels_of(template: str) -> Family | None:
    """The row of a model that says everything in channels, with tools or without."""
    row = family_of(template, takes_tools=True)
    return row if row.form == "channels" else None


def hidden_markers(texts: Collection[str], special: Collection[str]) -> frozenset[str]:
    """The special tokens among what is written."""
    return frozenset(name for name in special if any(name in text for text in texts))


def spelled(text: str, hidden: Collection[str]) -> str:
    """A marker as it comes out of the tokens: HIDDEN before each special one."""
    for name in hidden:
        text = text.replace(name, HIDDEN + name)
    return text


def name_of(row: Family, head: str) -> str:
    """The name out of what stands between `head` and `neck`."""
    name = head.replace(HIDDEN, "").strip()
    return re.sub(f"(?:{row.suffix})$", "", name) if row.suffix else name


def call_id(request_id: str, index: int) -> str:
    """The same for the same call of the same request, wherever it is computed."""
    return f"call_{sha256(f'{request_id}/{index}'.encode()).hexdigest()[:24]}"


def history_id(row: Family, known: str, name: str, number: int) -> str:
    """An earlier call's id as this family's template can take it.

    `number`: of the call among all of the conversation, from 0.
    """
    match row.history_id:
        case "numbered":
            fits = re.fullmatch(r"functions\..+:\d+", known)
            return known if fits else f"functions.{name}:{number}"
        case "nine":
            fits = re.fullmatch(r"[A-Za-z0-9]{9}", known)
            return known if fits else sha256(known.encode()).hexdigest()[:9]
        case "any":
            return known
