"""The native API, `POST /ai/run/{model}`: its JSON in, its JSON and events out.

Pure: bytes to `Ask`, `Piece` to bytes. Knows no HTTP, no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from edge import formats, options, sse, thinking, tools
from edge.ask import Ask, Broke, End, Piece, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from edge.checks import BadField, Fields, read, required
from edge.envelope import envelope, error_envelope, usage
from edge.gathered import Call, gather
from edge.messages import messages
from edge.spelled import Spelled
from routing.errors import Failure


def opened(fields: Fields) -> tuple[Fields, str]:
    """Of {"model", "input"}, the input, and for which model. Raises Failure(BAD_INPUT)."""
    fields.need("model", "input")
    model, taken = fields.text("model"), fields.fields("input")
    if not model or taken is None:
        raise BadField("/model", "Length of '/model' must be >= 1, got 0")
    return taken, model


def parse(body: bytes, model: str) -> Ask:
    """What the client asks of `model`; raises Failure(BAD_INPUT) naming the field that is wrong."""
    return parse_fields(read(body), model)


def parse_fields(fields: Fields, model: str) -> Ask:
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
    if raw:
        tools.refuse_tools(fields)
    _refuse_logprobs(fields)
    if fields.integer("n", 1, 128) not in {None, 1}:
        raise BadField("/n", "'/n': several choices are given by /ai/v1/chat/completions")
    grammar, grammar_at = formats.asked(fields)
    return Ask(
        model=model,
        messages=turns,
        prompt=prompt,
        raw=raw,
        stream=fields.flag("stream") or False,
        stops=options.stops(fields),
        grammar=grammar,
        grammar_at=grammar_at,
        reject_if_busy=options.rejects_if_busy(fields),
        tools=tools.tools(fields),
        template_args=thinking.template_args(fields),
        sampling=options.sampling(fields, options.NATIVE),
    )


_BEFORE, _BETWEEN, _AFTER = b'data: {"response":', b',"p":"', b'"}\n\n'
_BEFORE_THOUGHT = b'data: {"response":"","reasoning_content":'
_PADDED = 32  # bytes: of text and padding together, or a multiple
_PADDING = b"abcdefghijklmnopqrstuvwxyz0123456789"


class Answer(Spelled):
    """One request's answer as this API spells it.

    An event with text has padding, `p`, after Cloudflare's, by which all events have one size, or
    a few: who watches an encrypted stream would else read the answer off the lengths of its tokens
    (https://blog.cloudflare.com/ai-side-channel-attack-mitigated). Readers do not look at it.
    """

    def __init__(self, *, is_json: bool = False) -> None:
        """`is_json`: whether JSON was asked for. A whole answer then is that, and no text."""
        self._is_json = is_json
        self._calls: list[Call] = []  # told at the end

    def text_frame(self, text: str) -> bytes:
        """The event that tells more text, not the first: what `frames` makes of it, but sooner."""
        return _padded(_BEFORE, text)

    def frames(self, piece: Piece) -> bytes:
        """The events that tell `piece`, b"" for none. `End` closes the stream with [DONE].

        A broken answer ends in an event named `error` that holds the v4 envelope, and in no
        [DONE]: that, too, tells a reader that the answer is not whole.
        """
        match piece:
            case Text(text=text):
                return self.text_frame(text) if text else b""
            case Reasoning(text=text):
                return _padded(_BEFORE_THOUGHT, text)
            case ToolStart() | ToolArguments() | ToolEnd():
                self._hear(piece)
                return b""
            case End(reason=reason, usage=used):
                last = {"response": "", "finish_reason": reason, "usage": usage(used)}
                return self._called() + sse.event(last) + sse.DONE
            case Broke(code=code, detail=detail):
                return sse.event(error_envelope(Failure(code, detail)), "error")

    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        """The JSON body of an answer that was not streamed."""
        made = gather(pieces)
        whole = [native for call in made.calls if (native := call.native) is not None]
        text = made.text + "".join(call.text for call in made.calls if not call.whole)
        as_json = self._is_json and not made.calls
        result: dict[str, Any] = {"response": _as_json(text) if as_json else text}
        if made.reasoning:
            result["reasoning_content"] = made.reasoning
        if whole:
            result["tool_calls"] = whole
        result |= {"finish_reason": end.reason, "usage": usage(end.usage)}
        return msgspec.json.encode(envelope(result))

    def _hear(self, piece: ToolStart | ToolArguments | ToolEnd) -> None:
        match piece:
            case ToolStart(id=known, name=name):
                self._calls.append(Call(id=known, name=name))
            case ToolArguments(text=text):
                self._calls[-1].arguments += text
            case ToolEnd():
                self._calls[-1].whole = True

    def _called(self) -> bytes:
        """One event with all whole calls: LangChain's reader looks at no other after the first.

        What did not become a whole call is text, for arguments are objects here.
        """
        rest = "".join(call.text for call in self._calls if not call.whole)
        whole = [native for call in self._calls if (native := call.native) is not None]
        frames = self.text_frame(rest) if rest else b""
        return frames + (sse.event({"response": "", "tool_calls": whole}) if whole else b"")


def _padded(before: bytes, text: str) -> bytes:
    said = sse.encode(text)
    return before + said + _BETWEEN + _PADDING[: -len(said) % _PADDED] + _AFTER


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
