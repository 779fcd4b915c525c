"""What may ride along with a prompt on any API: sampling, stop strings, features. Pure.

Ranges are those of the published schemas (Workers AI's llama models; OpenAI's chat completions).
`speculative` is this platform's own; `ignore_eos` is what vLLM and llama.cpp take, for measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge.ask import SamplingAsk
from edge.checks import BadField, Fields, as_number, mismatch
from routing.errors import Code

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_BIASES = 1024
_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_LEAST_REPETITION_PENALTY = 0.01  # logits are divided by it: smaller ones overflow


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float
    kind: Literal["integer", "number"] = "number"


NATIVE: Mapping[str, Range] = {
    "max_tokens": Range(1, _MAX_INT32, "integer"),
    "temperature": Range(0, 5),
    "top_p": Range(0, 2),
    "top_k": Range(1, 50, "integer"),
    "min_p": Range(0, 1),
    "seed": Range(0, 9_999_999_999, "integer"),
    "repetition_penalty": Range(0, 2),
    "frequency_penalty": Range(0, 2),
    "presence_penalty": Range(0, 2),
}
OPENAI: Mapping[str, Range] = {
    **NATIVE,
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "seed": Range(-_MAX_INT64 - 1, _MAX_INT64, "integer"),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
}

ANTHROPIC: Mapping[str, Range] = {
    **OPENAI,
    "temperature": Range(0, 1),
    "top_k": Range(0, _MAX_INT32, "integer"),
}

# Fields whose meaning this deployment cannot give: refused, for an answer that ignored them would
# be wrong without saying so. Empty values mean nothing and pass.
_UNSUPPORTED = {
    "functions": "code that is run beside the model is not taken: give '/tools'",
    "image": "images are not supported by this model",
}


def sampling(body: Fields, ranges: Mapping[str, Range], logprobs: int | None = None) -> SamplingAsk:
    """Sampling as asked: None where nothing was said. Values that mean the same become the same."""
    said: dict[str, Any] = {name: _ranged(body, name, ranges[name]) for name in ranges}
    newer_name = _ranged(body, "max_completion_tokens", ranges["max_tokens"])
    if newer_name is not None:
        said["max_tokens"] = newer_name
    if said["top_p"] is not None:
        said["top_p"] = min(said["top_p"], 1.0)  # documented up to 2: all of them, like 1
    if said["seed"] is not None:
        said["seed"] %= 2**63
    if said["repetition_penalty"] is not None:
        said["repetition_penalty"] = _repetition(said["repetition_penalty"])
    return SamplingAsk(
        **said,
        logit_bias=_logit_bias(body),
        logprobs=logprobs,
        speculate=body.flag("speculative") is not False,
        ignore_eos=body.flag("ignore_eos") is True,
    )


def stops(body: Fields, name: str = "stop") -> tuple[str, ...]:
    """Stop strings: one, or a list of at most 16, each of 1 to 1,000 characters."""
    asked, pointer = body.value(name), body.at(name)
    if asked is None:
        return ()
    if isinstance(asked, str):
        return (_stop(pointer, asked),)
    if not isinstance(asked, list):
        raise mismatch(pointer, asked, "string", "array")
    if len(asked) > MAX_STOPS:
        says = f"'{pointer}' must have <= {MAX_STOPS} items, got {len(asked)}"
        raise BadField(pointer, says)
    return tuple(_stop(f"{pointer}/{at}", stop) for at, stop in enumerate(asked))


def rejects_if_busy(body: Fields) -> bool:
    """Whether the request is to be refused rather than to wait for others."""
    asked = body.fields("options")
    return asked is not None and asked.flag("rejectIfBusy") is True


def refuse_unsupported(body: Fields) -> None:
    """Refuse what would have to be ignored: adapters, images."""
    for name, why in _UNSUPPORTED.items():
        if body.value(name):
            raise BadField(body.at(name), f"'{body.at(name)}': {why}")
    if body.value("lora"):
        says = f"'{body.at('lora')}': this model does not support LoRA adapters"
        raise BadField(body.at("lora"), says, Code.NO_ADAPTERS)


def _ranged(body: Fields, name: str, allowed: Range) -> float | None:
    if allowed.kind == "integer":
        return body.integer(name, int(allowed.low), int(allowed.high))
    return body.number(name, allowed.low, allowed.high)


def _repetition(penalty: float) -> float:
    """0 is documented as least and can only mean none: logits are divided by the penalty."""
    return max(penalty, _LEAST_REPETITION_PENALTY) if penalty else 1.0


def _stop(pointer: str, stop: Any) -> str:
    if not isinstance(stop, str):
        raise mismatch(pointer, stop, "string")
    if not 1 <= len(stop) <= MAX_STOP_CHARS:
        says = f"Length of '{pointer}' must be 1 to {MAX_STOP_CHARS}, got {len(stop)}"
        raise BadField(pointer, says)
    return stop


def _logit_bias(body: Fields) -> tuple[tuple[int, float], ...]:
    """{"token id": bias}; whether the model has such a token is the tokenizer's to say."""
    biases = body.fields("logit_bias")
    if biases is None:
        return ()
    entries: Sequence[tuple[str, Any]] = biases.items()
    if len(entries) > MAX_BIASES:
        says = f"'{biases.at()}' must have <= {MAX_BIASES} members, got {len(entries)}"
        raise BadField(biases.at(), says)
    return tuple(
        (_token_id(biases, name), as_number(biases.at(name), bias, -100, 100))
        for name, bias in entries
    )


def _token_id(biases: Fields, name: str) -> int:
    if name.isascii() and name.isdigit() and len(name) <= len(str(_MAX_INT32)):
        return int(name)
    raise BadField(biases.at(name), f"'{biases.at(name)}' is not a token id")
