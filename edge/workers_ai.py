"""The native API, `POST /ai/run/{model}`: its JSON in, its JSON and events out.

Pure: bytes to `Ask`, `Piece` to bytes. Knows no HTTP, no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edge import formats, options, sse
from edge.ask import Ask, Broke, End, Piece, Text
from edge.checks import BadField, Fields, read, required
from edge.envelope import envelope, error_envelope, usage
from edge.messages import messages
from routing.errors import Failure


def parse(body: bytes, model: str) -> Ask:
    """What the client asks of `model`; raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    turns, prompt = messages(fields), fields.text("prompt")
    if turns is None and prompt is None:
        either = f"{required('', 'prompt')}, {required('', 'messages')}"
        raise BadField("", f"oneOf at '/' not met, 0 matches: {either}")
    if turns is not None and prompt is not None:
        raise BadField("", "oneOf at '/' not met, 2 matches: give one of '/prompt' and '/messages'")
    if prompt == "":
        raise BadField("/prompt", "Length of '/prompt' must be >= 1, got 0")
    raw = fields.flag("raw") or False
    if raw and prompt is None:
        raise BadField("/raw", "'/raw' needs '/prompt': messages go through the chat template")
    options.refuse_unsupported(fields)
    _refuse_logprobs(fields)
    return Ask(
        model=model,
        messages=turns,
        prompt=prompt,
        raw=raw,
        stream=fields.flag("stream") or False,
        stops=options.stops(fields),
        grammar=formats.grammar(fields),
        sampling=options.sampling(fields, options.NATIVE),
    )


_BEFORE, _AFTER = sse.around({"response": ""}, "response")


class Answer:
    """One request's answer as this API spells it."""

    def __init__(self, *, is_json: bool = False) -> None:
        """`is_json`: whether JSON was asked for. A whole answer then is that, and no text."""
        self._is_json = is_json

    def text_frame(self, text: str) -> bytes:
        """The event that tells more text, not the first: what `frames` makes of it, but sooner."""
        return _BEFORE + sse.encode(text) + _AFTER

    def frames(self, piece: Piece) -> bytes:
        """The events that tell `piece`, b"" for none. `End` closes the stream with [DONE].

        A broken answer ends in an event named `error` that holds the v4 envelope, and in no
        [DONE]: that, too, tells a reader that the answer is not whole.
        """
        match piece:
            case Text(text=text):
                return self.text_frame(text) if text else b""
            case End(usage=used):
                return sse.event({"response": "", "usage": usage(used)}) + sse.DONE
            case Broke(code=code, detail=detail):
                return sse.event(error_envelope(Failure(code, detail)), "error")

    def whole(self, texts: Iterable[Text], end: End) -> bytes:
        """The JSON body of an answer that was not streamed."""
        text = "".join(text.text for text in texts)
        response = _as_json(text) if self._is_json else text
        return msgspec.json.encode(envelope({"response": response, "usage": usage(end.usage)}))


def error(failure: Failure) -> bytes:
    """The JSON body of a refusal; its status is `failure.code.meaning.status`."""
    return msgspec.json.encode(error_envelope(failure))


def _as_json(text: str) -> msgspec.Raw | str:
    """JSON as it is, to the last digit; text that is none, as where an answer was cut short."""
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return text
    return msgspec.Raw(text.encode())


def _refuse_logprobs(fields: Fields) -> None:
    for name in ("logprobs", "top_logprobs"):
        if fields.value(name):
            says = f"'/{name}': log probabilities are given by /ai/v1/chat/completions"
            raise BadField(f"/{name}", says)
