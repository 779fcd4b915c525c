"""What a client asked, once it has been understood: the one value both public APIs parse into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from routing.errors import Code
from routing.wire import Grammar

Message = dict[
    str, Any
]  # as the chat template takes it: role, content (text), name, tool_calls, ...


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
class Ask:
    model: str
    messages: tuple[Message, ...] | None = None  # exactly one of messages and prompt
    prompt: str | None = None
    raw: bool = False  # prompt goes to the model as it is, without the chat template
    stream: bool = False
    include_usage: bool = False  # OpenAI's stream_options.include_usage
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    sampling: SamplingAsk = field(default_factory=SamplingAsk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


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
class End:
    """The answer is complete."""

    reason: Literal["stop", "length"]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Broke:
    """The answer ends here, unfinished: something failed after it had begun."""

    code: Code
    detail: str


Piece = Text | End | Broke
