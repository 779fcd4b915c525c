"""OpenAI's Responses, `POST /ai/v1/responses`: what a client asks. `responses_answer` is the rest.

Pure: bytes to `Turn`. Knows no HTTP, no model, and no store: earlier turns are named, not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge import options
from edge.ask import Ask, SamplingAsk
from edge.checks import BadField, Fields, as_fields, mismatch, read
from edge.like_chat import chosen
from edge.messages import shallow
from edge.responses_items import Item, conversation, items

LOGPROBS = "message.output_text.logprobs"
_MAX_TOP_LOGPROBS = 20
_MAX_PAIRS, _MAX_NAME, _MAX_VALUE = 16, 64, 512  # of metadata

# Fields whose meaning this deployment cannot give.
_UNSUPPORTED = {
    "background": "answers are given at once, none in the background",
    "conversation": "conversations are not kept here: give '/previous_response_id'",
    "prompt": "prompts are not kept here: give '/instructions' and '/input'",
}
_THEIRS = {
    "/function/": "/",
    "/response_format/json_schema": "/text/format",
    "/response_format": "/text/format",
    "/reasoning_effort": "/reasoning/effort",
}
_REPEATED_TEXTS = ("user", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(Ask):
    """One turn of a conversation. `messages` are whole once earlier turns were recalled."""

    items: tuple[Item, ...]  # the input
    instructions: str | None = None
    previous: str | None = None  # the response that this one goes on from
    stored: bool = True
    repeated: Mapping[str, Any]  # what the response repeats of the request

    @property
    def refers(self) -> bool:
        """Whether it needs what was stored."""
        return self.previous is not None or any(map(is_reference, self.items))


def parse(body: bytes) -> Turn:
    """What the client asks; raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    fields.need("model", "input")
    model = fields.text("model")
    if not model:
        raise BadField("/model", "Length of '/model' must be >= 1, got 0")
    for name, why in _UNSUPPORTED.items():
        if fields.value(name):
            raise BadField(fields.at(name), f"'{fields.at(name)}': {why}")
    given, instructions = items(fields), fields.text("instructions")
    previous = fields.text("previous_response_id")
    if not given and previous is None:
        raise BadField("/input", "'/input' must have >= 1 items, got 0")
    asked = chosen(_like_chat(fields), _THEIRS)
    return Turn(
        model=model,
        messages=conversation(instructions, given),
        items=given,
        instructions=instructions,
        previous=previous,
        stored=fields.flag("store") is not False,
        stream=fields.flag("stream") or False,
        stops=options.stops(fields),
        sampling=_sampling(fields),
        repeated=_repeated(fields),
        **asked,
    )


def recalled(turn: Turn, earlier: Sequence[Item], found: Mapping[str, Item]) -> Turn:
    """The turn with what came before it, and with the items that its references name."""
    own = tuple(found[one["id"]] if is_reference(one) else one for one in turn.items)
    return replace(turn, items=own, messages=conversation(turn.instructions, (*earlier, *own)))


def is_reference(item: Item) -> bool:
    return bool(item["type"] == "item_reference")


def _sampling(fields: Fields) -> SamplingAsk:
    said = options.sampling(fields, options.OPENAI, _logprobs(fields))
    allowed = options.OPENAI["max_tokens"]
    most = fields.integer("max_output_tokens", int(allowed.low), int(allowed.high))
    return replace(said, max_tokens=most)


def _logprobs(fields: Fields) -> int | None:
    include = fields.array("include") or []
    top = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS)
    return (top or 0) if top or LOGPROBS in include else None


def _like_chat(fields: Fields) -> Fields:
    """Tools and format as chat completions have them."""
    given = fields.array("tools") or []
    at = fields.at("tools")
    tools = [_function(as_fields(f"{at}/{index}", tool)) for index, tool in enumerate(given)]
    return Fields(
        dict(fields.items())
        | {
            "tools": tools,
            "tool_choice": _choice(fields),
            "parallel_tool_calls": fields.flag("parallel_tool_calls"),
            "response_format": _format(fields),
            "reasoning_effort": _effort(fields),
        }
    )


def _effort(fields: Fields) -> str | None:
    reasoning = fields.fields("reasoning")
    return None if reasoning is None else reasoning.text("effort")


def _function(tool: Fields) -> dict[str, Any]:
    """Of functions alone: nothing runs on this side, as web searches would."""
    tool.need("type")
    if tool.text("type") != "function":
        says = f"'{tool.at('type')}': only 'function' is supported by this deployment"
        raise BadField(tool.at("type"), says)
    tool.need("name")
    tool.text("name")
    members = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.value(name) for name in members}}


def _choice(fields: Fields) -> Any:
    choice = fields.value("tool_choice")
    if not isinstance(choice, dict):
        return choice
    named = as_fields(fields.at("tool_choice"), choice)
    named.need("type")
    if named.text("type") == "allowed_tools":  # some of the tools, by their names
        return choice
    if named.text("type") != "function":
        says = f"'{named.at('type')}': only 'function' is supported by this deployment"
        raise BadField(named.at("type"), says)
    named.need("name")
    return {"type": "function", "function": {"name": named.text("name")}}


def _format(fields: Fields) -> dict[str, Any] | None:
    text = fields.fields("text")
    form = None if text is None else text.fields("format")
    if form is None:
        return None
    form.need("type")
    kind = form.text("type")
    if kind != "json_schema":
        return {"type": kind}
    members = ("name", "description", "schema", "strict")
    return {"type": kind, "json_schema": {name: form.value(name) for name in members}}


def _repeated(fields: Fields) -> dict[str, Any]:
    """Members of the response that are as the client had them, with this API's defaults."""
    texts = {name: said for name in _REPEATED_TEXTS if (said := fields.text(name)) is not None}
    reasoning = fields.fields("reasoning") or Fields({}, "/reasoning")
    text = fields.fields("text") or Fields({}, "/text")
    effort = {name: reasoning.text(name) for name in ("effort", "summary")}
    parallel = fields.flag("parallel_tool_calls")
    _check_truncation(fields)
    return {
        "instructions": fields.text("instructions"),
        "metadata": _metadata(fields),
        "parallel_tool_calls": parallel is not False,
        "temperature": fields.value("temperature"),
        "tool_choice": shallow(fields.at("tool_choice"), fields.value("tool_choice")) or "auto",
        "tools": [_tool(tool) for tool in shallow(fields.at("tools"), fields.array("tools")) or []],
        "top_p": fields.value("top_p"),
        "background": False,
        "max_output_tokens": fields.value("max_output_tokens"),
        "previous_response_id": fields.text("previous_response_id"),
        "reasoning": effort,
        "store": fields.flag("store") is not False,
        "text": {"format": shallow(text.at("format"), text.value("format")) or {"type": "text"}},
        "top_logprobs": fields.value("top_logprobs") or 0,
        # `auto` is taken, but nothing is ever left out: what is too long is refused.
        "truncation": "disabled",
        **texts,
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": None, "strict": None, **tool}


def _check_truncation(fields: Fields) -> None:
    if fields.text("truncation") not in {None, "auto", "disabled"}:
        at = fields.at("truncation")
        raise BadField(at, f"'{at}' must be one of 'auto', 'disabled'")


def _metadata(fields: Fields) -> dict[str, str]:
    """At most 16 pairs of short texts, as OpenAI documents."""
    given = fields.fields("metadata")
    if given is None:
        return {}
    pairs = given.items()
    if len(pairs) > _MAX_PAIRS:
        says = f"'{given.at()}' must have <= {_MAX_PAIRS} members, got {len(pairs)}"
        raise BadField(given.at(), says)
    for name, value in pairs:
        if not isinstance(value, str):
            raise mismatch(given.at(name), value, "string")
        if len(name) > _MAX_NAME or len(value) > _MAX_VALUE:
            says = f"names up to {_MAX_NAME} and values up to {_MAX_VALUE} characters"
            raise BadField(given.at(name), f"'{given.at(name)}': metadata takes {says}")
    return dict(pairs)
