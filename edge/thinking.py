"""Models that think before they answer: how each writes it, and what clients say of it. Pure.

The text between the marks is `reasoning_content` to clients, never part of the answer. What
switches thinking is an argument of the model's own chat template: `chat_template_kwargs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from edge.ask import Scalar
from edge.checks import BadField, Fields, mismatch

MOST_ARGS = 32
_MAX_CHARS = 1000  # of one value
_ARG = re.compile("[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)
# What templates are given anyway, by whom it belongs to.
_RESERVED = frozenset(
    [
        *("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range"),
        *("cycler", "joiner", "lipsum"),
    ]
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Marks around the thoughts, which come first if they come at all.

    A prompt that ends with `open` has begun them: then the answer has `close` only.
    """

    open: str
    close: str

    def map(self, spell: Callable[[str], str]) -> Thinking:
        """The same with its marks spelled otherwise."""
        return replace(self, open=spell(self.open), close=spell(self.close))


THINKING = (  # the first that a chat template writes, or a tokenizer has tokens for
    Thinking(open="<think>", close="</think>"),  # Qwen3, DeepSeek, Kimi K2 Thinking, GLM, SmolLM3
    # gpt-oss: what is between is read by `edge.channels`.
    Thinking(open="<|channel|>analysis<|message|>", close="<|end|><|start|>assistant"),
    Thinking(open="[THINK]", close="[/THINK]"),  # Magistral
    Thinking(open="<seed:think>", close="</seed:think>"),  # Seed-OSS
    Thinking(open="◁think▷", close="◁/think▷"),  # Kimi-VL
)


def thinking_of(template: str, tokens: Collection[str]) -> Thinking | None:
    """The row of a model with this chat template and these added tokens."""
    for row in THINKING:
        if any(mark in template or mark in tokens for mark in (row.open, row.close)):
            return row
    return None


def template_args(body: Fields) -> tuple[tuple[str, Scalar], ...]:
    """`chat_template_kwargs` and `reasoning_effort`; raises Failure(BAD_INPUT) naming the field.

    An effort of "none" is no thinking to templates that know a switch only.
    """
    args: dict[str, Scalar] = {}
    effort = body.text("reasoning_effort")
    if effort is not None:
        at = body.at("reasoning_effort")
        if effort not in EFFORTS:
            raise BadField(at, f"'{at}' must be one of {', '.join(map(repr, EFFORTS))}")
        args["reasoning_effort"] = effort
        if effort == "none":
            args |= {"enable_thinking": False, "thinking": False}
    said = body.fields("chat_template_kwargs")
    if said is not None:
        args |= _said(said)
    return tuple(args.items())


def _said(said: Fields) -> dict[str, Scalar]:
    entries = said.items()
    if len(entries) > MOST_ARGS:
        says = f"'{said.at()}' must have <= {MOST_ARGS} members, got {len(entries)}"
        raise BadField(said.at(), says)
    return {name: _scalar(said, name) for name, _ in entries}


def _scalar(said: Fields, name: str) -> Scalar:
    at, value = said.at(name), said.value(name)
    if not _ARG.fullmatch(name) or name in _RESERVED or name.endswith("_token"):
        raise BadField(at, f"'{at}' is no argument that may be given")
    if value is not None and not isinstance(value, str | int | float):
        raise mismatch(at, value, "string", "number", "boolean")
    if isinstance(value, str) and len(value) > _MAX_CHARS:
        raise BadField(at, f"Length of '{at}' must be <= {_MAX_CHARS}, got {len(value)}")
    return value
