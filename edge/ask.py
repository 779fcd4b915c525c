"""What a client asked, once it has been understood: the one value both public APIs parse into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from routing.errors import Code
from routing.region import Task
from routing.wire import Grammar

Message = dict[
    str, Any
]  # as the chat template takes it: role, content (text), name, tool_calls, ...
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingAsk:
    """Sampling as the client put it; None: not said, the model's default applies."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    speculate: bool = True  # False: each token by a step of its own
    ignore_eos: bool = False  # the model's own end of text does not end the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)  # JSON Schema of an object
    strict: bool = False  # arguments must match `parameters`, word for word


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAsk:
    """What may be called, and what has to be."""

    offered: tuple[Tool, ...] = ()  # empty: none, as with `tool_choice: "none"`
    forced: tuple[str, ...] = ()  # the answer is calls of these; empty: as the model likes
    most: int | None = None  # calls in one answer; None: any number

    def find(self, name: str) -> Tool | None:
        return next((tool for tool in self.offered if tool.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    task: ClassVar[Task] = "text-generation"
    model: str
    messages: tuple[Message, ...] | None = None  # exactly one of messages, prompt and token_ids
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None  # a prompt that the client has tokenised
    raw: bool = False  # prompt goes to the model as it is, without the chat template
    echo: bool = False  # the prompt is said ahead of the answer
    fallbacks: tuple[str, ...] = ()  # models to turn to
    stream: bool = False
    include_usage: bool = False  # OpenAI's stream_options.include_usage
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    grammar_at: str = ""  # which field asked for it
    reject_if_busy: bool = False  # refuse what could not begin at once
    tools: ToolAsk = field(default_factory=ToolAsk)
    template_args: tuple[tuple[str, Scalar], ...] = ()  # more that the chat template is given
    sampling: SamplingAsk = field(default_factory=SamplingAsk)
    choices: tuple[Ask, ...] = ()  # of an answer with several: each by itself; empty: this is all
    counts_prompt: bool = True  # False: a choice whose prompt another one counts

    def of(self, model: str) -> Self:
        """The same of another model."""
        if model == self.model:
            return self
        return replace(self, model=model, choices=tuple(it.of(model) for it in self.choices))


def with_choices(asks: Sequence[Ask], n: int) -> Ask:
    """One ask that is answered by `n` choices for each of `asks`.

    A seed that the client gave is that of each prompt's first choice; the others count up from it.
    """
    choices = tuple(_choice(ask, index) for ask in asks for index in range(n))
    return choices[0] if len(choices) == 1 else replace(asks[0], choices=choices)


def _choice(ask: Ask, index: int) -> Ask:
    seed = ask.sampling.seed
    if seed is not None:
        ask = replace(ask, sampling=replace(ask.sampling, seed=(seed + index) % 2**63))
    return replace(ask, counts_prompt=index == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion: thoughts, with the last token of each mark


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """More of the answer. `text` is whole characters, past every stop string it could begin."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """More of what the model thinks before it answers; stop strings do not act on it."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStart:
    """A call begins: of an offered tool, always. The one before it is over."""

    index: int  # of calls in this answer, from 0
    id: str  # the same however often the request is made again, after whatever was lost
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolArguments:
    """More of the JSON of a call's arguments, of the call that began last."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEnd:
    """The call is whole: its arguments, put together, are one JSON object.

    A call that is cut off at `max_tokens`, or whose JSON broke after it had begun, has none.
    """

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The answer is complete. `tool_calls`: it has calls, and was not cut off."""

    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage
    stop: str | None = None  # the stop string that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Broke:
    """The answer ends here, unfinished: something failed after it had begun."""

    code: Code
    detail: str


# An answer is pieces of these, in the order in which the model said them, then End or Broke. How
# an answer is cut into pieces means nothing. Calls come one after the other, never interleaved.
Said = Text | Reasoning | ToolStart | ToolArguments | ToolEnd
Piece = Said | End | Broke
