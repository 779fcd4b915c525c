"""OpenAI's completions, `POST /ai/v1/completions`: a prompt as it is, without a chat template.

Pure: bytes to `Ask`, `Piece` to bytes. Knows no HTTP, no model, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from edge import formats, openai, options, sse
from edge.ask import Ask, Broke, End, Piece, Text, TokenLogprob, Usage, with_choices
from edge.checks import BadField, Fields, mismatch, read
from edge.fallback import models_of
from edge.gathered import gather
from edge.spelled import Spelled
from edge.tools import refuse_tools
from routing.errors import Failure

_MOST_PROMPTS = 128
_MAX_LOGPROBS = 20  # OpenAI's own limit is 5
_MAX_TOKEN_ID = 2**31 - 1


def parse(body: bytes) -> Ask:
    """What the client asks; raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    fields.need("model", "prompt")
    model, *fallbacks = models_of(fields)
    options.refuse_unsupported(fields)
    refuse_tools(fields)
    if fields.value("suffix"):
        raise BadField("/suffix", "'/suffix': text is only ever added at the end")
    logprobs = fields.integer("logprobs", 0, _MAX_LOGPROBS)
    echo = fields.flag("echo") or False
    if echo and logprobs is not None:
        raise BadField("/echo", "'/echo': log probabilities are given of what is made only")
    stream_options = fields.fields("stream_options") or Fields({}, "/stream_options")
    grammar, grammar_at = formats.asked(fields)
    common = Ask(
        model=model,
        raw=True,
        echo=echo,
        fallbacks=tuple(fallbacks),
        reject_if_busy=options.rejects_if_busy(fields),
        stream=fields.flag("stream") or False,
        include_usage=stream_options.flag("include_usage") or False,
        stops=options.stops(fields),
        grammar=grammar,
        grammar_at=grammar_at,
        sampling=options.sampling(fields, options.OPENAI, logprobs),
    )
    asks = [replace(common, **prompt) for prompt in _prompts(fields, echo=echo)]
    return with_choices(asks, _per_prompt(fields, len(asks)))


def _per_prompt(fields: Fields, num_prompts: int) -> int:
    n = fields.integer("n", 1, openai.MOST_CHOICES) or 1
    best_of = fields.integer("best_of", 1, openai.MOST_CHOICES)
    if best_of not in {None, n}:
        raise BadField("/best_of", "'/best_of' must be '/n': all that is made is given")
    if n * num_prompts > openai.MOST_CHOICES:
        says = f"'/n' times the number of prompts must be <= {openai.MOST_CHOICES}"
        raise BadField("/n", says)
    return n


def _prompts(fields: Fields, *, echo: bool) -> list[dict[str, Any]]:
    """One or several, each a text or a list of token ids."""
    prompt = fields.value("prompt")
    if isinstance(prompt, str):
        return [_text("/prompt", prompt)]
    if not isinstance(prompt, list):
        raise mismatch("/prompt", prompt, "string", "array")
    if not prompt:
        raise BadField("/prompt", "'/prompt' must have >= 1 items, got 0")
    if isinstance(prompt[0], int | float):
        return [_ids("/prompt", prompt, echo=echo)]
    if len(prompt) > _MOST_PROMPTS:
        says = f"'/prompt' must have <= {_MOST_PROMPTS} items, got {len(prompt)}"
        raise BadField("/prompt", says)
    return [_one(f"/prompt/{at}", one, echo=echo) for at, one in enumerate(prompt)]


def _one(pointer: str, prompt: Any, *, echo: bool) -> dict[str, Any]:
    if isinstance(prompt, str):
        return _text(pointer, prompt)
    if isinstance(prompt, list):
        return _ids(pointer, prompt, echo=echo)
    raise mismatch(pointer, prompt, "string", "array")


def _text(pointer: str, prompt: str) -> dict[str, Any]:
    if not prompt:
        raise BadField(pointer, f"Length of '{pointer}' must be >= 1, got 0")
    return {"prompt": prompt}


def _ids(pointer: str, prompt: list[Any], *, echo: bool) -> dict[str, Any]:
    """Whether the model has such tokens is the tokenizer's to say."""
    if echo:
        raise BadField("/echo", f"'/echo' needs a text, and '{pointer}' is token ids")
    if not prompt:
        raise BadField(pointer, f"'{pointer}' must have >= 1 items, got 0")
    return {"token_ids": tuple(_id(f"{pointer}/{at}", it) for at, it in enumerate(prompt))}


def _id(pointer: str, token_id: Any) -> int:
    if isinstance(token_id, float) and token_id.is_integer():
        token_id = int(token_id)  # 3.0 is an integer to JSON Schema
    if type(token_id) is not int:
        raise mismatch(pointer, token_id, "integer")
    if not 0 <= token_id <= _MAX_TOKEN_ID:
        raise BadField(pointer, f"'{pointer}' is not a token id")
    return token_id


class Answer(Spelled):
    """One choice of an answer as this API spells it."""

    def __init__(self, ask: Ask, *, request_id: str, created: int, index: int = 0) -> None:
        self._ask = ask
        self._index = index
        self._offset = 0  # characters told
        self._echo = ask.prompt or "" if ask.echo else ""
        head = {"id": f"cmpl-{request_id}", "object": "text_completion"}
        self._head = head | {"created": created, "model": ask.model}
        self._before, self._after = sse.around(self._chunk(""), "text")

    def text_frame(self, text: str) -> bytes:
        """The chunk that tells more text, not the first: what `frames` makes of it, but sooner."""
        return self._before + sse.encode(text) + self._after

    def frames(self, piece: Piece) -> bytes:
        """The chunks that tell `piece`, b"" for none. `End` closes the stream with [DONE]."""
        match piece:
            case Text(text=text, logprobs=logprobs):
                if not text and not logprobs:
                    return b""
                if not logprobs:
                    return self._begin() + self.text_frame(text)
                return sse.event(self._chunk(text, logprobs=self._logprobs(logprobs)))
            case End(usage=used):
                return self.finish(piece) + self.close(used)
            case Broke(code=code, detail=detail):
                return sse.event(openai.error_object(Failure(code, detail)))
            case _:
                return b""  # a prompt as it is is answered by text

    def finish(self, end: End) -> bytes:
        """The chunk that ends this choice."""
        return self._begin() + sse.event(self._chunk("", reason=end.reason))

    def close(self, used: Usage) -> bytes:
        """What comes after all choices have ended."""
        if not self._ask.include_usage:
            return sse.DONE
        last = self._head | {"choices": [], "usage": openai.usage(used)}
        return sse.event(last) + sse.DONE

    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        """The JSON body of an answer that was not streamed."""
        return self.body([self.choice(pieces, end)], end.usage)

    def body(self, choices: Sequence[dict[str, Any]], used: Usage) -> bytes:
        return msgspec.json.encode(self._head | {"choices": choices, "usage": openai.usage(used)})

    def choice(self, pieces: Iterable[Piece], end: End) -> dict[str, Any]:
        made = gather(pieces)
        return {
            "text": self._echo + made.text,
            "index": self._index,
            "logprobs": self._logprobs(made.logprobs),
            "finish_reason": end.reason,
        }

    def _begin(self) -> bytes:
        echo, self._echo = self._echo, ""
        return self.text_frame(echo) if echo else b""

    def _chunk(
        self, text: str, *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": self._index,
            "logprobs": logprobs,
            "finish_reason": reason,
            "text": text,
        }
        return self._head | {"choices": [choice]}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Four lists side by side; `text_offset` counts characters from the answer's beginning."""
        if self._ask.sampling.logprobs is None:
            return None
        spelled = [openai.shown(entry.text) for entry in entries]
        offsets = []
        for text in spelled:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": spelled,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {openai.shown(text): logprob for text, logprob in entry.top} for entry in entries
            ],
            "text_offset": offsets,
        }
