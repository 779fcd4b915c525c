"""OpenAI's chat completions, `POST /ai/v1/chat/completions`: its JSON in, its JSON and chunks out.

Pure: bytes to `Ask`, `Piece` to bytes. Knows no HTTP, no model, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from edge import envelope, formats, options, sse, thinking, tools
from edge.ask import (
    Ask,
    Broke,
    End,
    Piece,
    Reasoning,
    Text,
    TokenLogprob,
    ToolArguments,
    ToolEnd,
    ToolStart,
    Usage,
    with_choices,
)
from edge.checks import BadField, Fields, read, required
from edge.fallback import models_of
from edge.gathered import gather
from edge.messages import messages
from edge.spelled import Spelled
from routing.errors import Code, Failure

MOST_CHOICES = 128  # in one answer
_MAX_TOP_LOGPROBS = 20

# `error.code` where OpenAI has a name of its own for what happened.
_ERROR_CODES = {
    Code.UNKNOWN_MODEL: "model_not_found",
    Code.UNAUTHENTICATED: "invalid_api_key",
    Code.NO_CAPACITY: "rate_limit_exceeded",
    Code.RATE_LIMITED: "rate_limit_exceeded",
    Code.QUOTA: "insufficient_quota",
}


def parse(body: bytes) -> Ask:
    """What the client asks; raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    model, *fallbacks = models_of(fields)
    turns = messages(fields)
    if turns is None:
        raise BadField("/messages", required("", "messages"))
    options.refuse_unsupported(fields)
    stream_options = fields.fields("stream_options") or Fields({}, "/stream_options")
    grammar, grammar_at = formats.asked(fields)
    ask = Ask(
        model=model,
        messages=turns,
        fallbacks=tuple(fallbacks),
        stream=fields.flag("stream") or False,
        include_usage=stream_options.flag("include_usage") or False,
        stops=options.stops(fields),
        grammar=grammar,
        grammar_at=grammar_at,
        reject_if_busy=options.rejects_if_busy(fields),
        tools=tools.tools(fields),
        template_args=thinking.template_args(fields),
        sampling=options.sampling(fields, options.OPENAI, _logprobs(fields)),
    )
    return with_choices([ask], fields.integer("n", 1, MOST_CHOICES) or 1)


class Answer(Spelled):
    """One choice of an answer as this API spells it.

    `request_id` and `created` (Unix seconds) are repeated in every chunk of it.
    """

    def __init__(self, ask: Ask, *, request_id: str, created: int, index: int = 0) -> None:
        self._ask = ask
        self._index = index
        self._begun = False
        self._head = {"id": f"chatcmpl-{request_id}", "created": created, "model": ask.model}
        self._before, self._after = sse.around(self._delta({"content": ""}), "content")

    def text_frame(self, text: str) -> bytes:
        """The chunk that tells more text, not the first: what `frames` makes of it, but sooner."""
        return self._before + sse.encode(text) + self._after

    def frames(self, piece: Piece) -> bytes:
        """The chunks that tell `piece`, b"" for none; the role goes ahead of the first.

        `End` closes the stream with [DONE]. A broken answer ends in an error object, which
        OpenAI's clients raise, and in no [DONE].
        """
        match piece:
            case Text(text=text, logprobs=logprobs):
                if not text and not logprobs:
                    return b""
                if not logprobs:
                    return self._role() + self.text_frame(text)
                return self._role() + sse.event(self._delta({"content": text}, logprobs=logprobs))
            case Reasoning() | ToolStart() | ToolArguments():
                return self._role() + sse.event(self._delta(_told(piece)))
            case ToolEnd():
                return b""
            case End(usage=used):
                return self.finish(piece) + self.close(used)
            case Broke(code=code, detail=detail):
                return sse.event(error_object(Failure(code, detail)))

    def finish(self, end: End) -> bytes:
        """The chunk that ends this choice."""
        return self._role() + sse.event(self._delta({}, finish_reason=end.reason))

    def close(self, used: Usage) -> bytes:
        """What comes after all choices have ended."""
        return self._usage(used) + sse.DONE

    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        """The JSON body of an answer that was not streamed."""
        return self.body([self.choice(pieces, end)], end.usage)

    def body(self, choices: Sequence[dict[str, Any]], used: Usage) -> bytes:
        answer = {"object": "chat.completion", "choices": choices, "usage": usage(used)}
        return msgspec.json.encode(self._head | answer)

    def choice(self, pieces: Iterable[Piece], end: End) -> dict[str, Any]:
        made = gather(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": made.text}
        if made.reasoning:
            message["reasoning_content"] = made.reasoning
        if made.calls:
            message["content"] = made.text or None
            message["tool_calls"] = [
                _call(call.id, call.name, call.arguments) for call in made.calls
            ]
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(made.logprobs),
            "finish_reason": end.reason,
        }

    def _role(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return sse.event(self._delta({"role": "assistant", "content": ""}))

    def _delta(
        self,
        delta: dict[str, Any],
        *,
        logprobs: Iterable[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """A chunk that holds a part of the answer."""
        choice: dict[str, Any] = {"index": self._index, "delta": delta}
        if self._ask.sampling.logprobs is not None:
            choice["logprobs"] = self._logprobs(logprobs)
        choice["finish_reason"] = finish_reason
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, used: Usage) -> bytes:
        """A chunk of its own, without choices; only where it was asked for."""
        if not self._ask.include_usage:
            return b""
        last = {"object": "chat.completion.chunk", "choices": [], "usage": usage(used)}
        return sse.event(self._head | last)

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if self._ask.sampling.logprobs is None:
            return None
        return {"content": [logprob_entry(entry) for entry in entries], "refusal": None}


def _told(piece: Reasoning | ToolStart | ToolArguments) -> dict[str, Any]:
    """The delta: a call's id and name come once, its arguments in parts."""
    match piece:
        case Reasoning(text=text):
            return {"reasoning_content": text}
        case ToolStart(index=index, id=known, name=name):
            return {"tool_calls": [{"index": index} | _call(known, name, "")]}
        case ToolArguments(index=index, text=text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _call(known: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": known, "type": "function", "function": {"name": name, "arguments": arguments}}


def error(failure: Failure) -> bytes:
    """The JSON body of a refusal; its status is `failure.code.meaning.status`."""
    return msgspec.json.encode(error_object(failure))


def error_object(failure: Failure) -> dict[str, Any]:
    """OpenAI's error object and Cloudflare's envelope in one: clients look for either."""
    pointer = failure.pointer if isinstance(failure, BadField) else ""
    told = {
        "message": envelope.message(failure),
        "type": failure.code.meaning.openai_type,
        "param": pointer.removeprefix("/").replace("/", ".") or None,
        "code": _ERROR_CODES.get(failure.code, failure.code.value),
    }
    return {"error": told} | envelope.error_envelope(failure)


def usage(used: Usage) -> dict[str, Any]:
    """As natively, but with the details always there, as OpenAI has them."""
    return envelope.usage(used) | {
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }


def logprob_entry(entry: TokenLogprob) -> dict[str, Any]:
    top = [_token(text, logprob) for text, logprob in entry.top]
    return _token(entry.text, entry.logprob) | {"top_logprobs": top}


def _token(text: str, logprob: float) -> dict[str, Any]:
    """A token's text and bytes: a part of a character is bytes, and no text of its own."""
    spelled = text.encode("utf-8", "surrogateescape")
    return {"token": shown(text), "logprob": logprob, "bytes": list(spelled)}


def shown(text: str) -> str:
    """A token's text as JSON can hold it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens to give beside each chosen one; None: no logprobs."""
    top = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise BadField("/top_logprobs", "'/top_logprobs' needs '/logprobs' to be true")
    return None
