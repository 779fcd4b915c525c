"""Anthropic's Messages: one answer as a message, or as the events that build it up.

Pure: `Piece` to bytes. Knows no HTTP, no model, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from edge import sse
from edge.anthropic import error_object
from edge.ask import Ask, Broke, End, Piece, Text, ToolEnd, ToolStart, Usage
from edge.parts import Part, Parts, is_empty
from edge.spelled import Spelled
from routing.errors import Failure

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {  # the delta's type, and the member that holds its text
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class Answer(Spelled):
    def __init__(self, ask: Ask, *, request_id: str) -> None:
        self._parts = Parts()
        self._begun = False
        self._num_prompt = 0
        self._around: tuple[bytes, bytes] | None = None  # a delta of the open text
        self._message: dict[str, Any] = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": ask.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def began(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt

    def text_frame(self, text: str) -> bytes:
        if self._around is None:
            return b""
        before, after = self._around
        return before + sse.encode(text) + after

    def frames(self, piece: Piece) -> bytes:
        """Named events, of which `message_stop` or `error` is the last."""
        match piece:
            case End():
                return self._beginning() + self._close() + self._ending(piece)
            case Broke(code=code, detail=detail):
                return self._beginning() + _event(error_object(Failure(code, detail)))
            case ToolEnd():
                return self._close()
        if is_empty(piece):
            return b""
        before = self._beginning()
        if not self._parts.goes_on(piece):
            before += self._close() + self._open(self._parts.begin(piece))
        return before + self._delta(self._parts.open, piece)

    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        self._parts.gather(pieces)
        content = {"content": [_block(part) for part in self._parts.all]}
        message = self._message | content | _stopped(end) | {"usage": _usage(end.usage)}
        return msgspec.json.encode(message)

    def _beginning(self) -> bytes:
        """The prompt's tokens are told at once: some clients look for them nowhere else."""
        if self._begun:
            return b""
        self._begun = True
        usage = _usage(Usage(prompt_tokens=self._num_prompt, completion_tokens=0))
        start = {"type": "message_start", "message": self._message | {"usage": usage}}
        return _event(start) + _event({"type": "ping"})

    def _open(self, part: Part) -> bytes:
        if part.kind == "text":
            delta = {"type": "text_delta", "text": ""}
            data = {"type": "content_block_delta", "index": part.index, "delta": delta}
            before, after = sse.around(data, "text")
            self._around = b"event: content_block_delta\n" + before, after
        start = {"type": "content_block_start", "index": part.index, "content_block": _block(part)}
        return _event(start)

    def _delta(self, part: Part | None, piece: Piece) -> bytes:
        if part is None or isinstance(piece, ToolStart | ToolEnd | End | Broke):
            return b""
        if isinstance(piece, Text):
            return self.text_frame(piece.text)
        kind, member = _DELTAS[part.kind]
        delta = {"type": kind, member: piece.text}
        return _event({"type": "content_block_delta", "index": part.index, "delta": delta})

    def _close(self) -> bytes:
        part, self._around = self._parts.close(), None
        if part is None:
            return b""
        at, signed = {"index": part.index}, b""
        if part.kind == "reasoning":  # without one the AI SDK does not give thoughts back
            delta = {"type": "signature_delta", "signature": ""}
            signed = _event({"type": "content_block_delta", **at, "delta": delta})
        return signed + _event({"type": "content_block_stop", **at})

    def _ending(self, end: End) -> bytes:
        delta = {"type": "message_delta", "delta": _stopped(end), "usage": _usage(end.usage)}
        return _event(delta) + _event({"type": "message_stop"})


def _event(data: dict[str, Any]) -> bytes:
    return sse.event(data, data["type"])


def _block(part: Part) -> dict[str, Any]:
    """A content block with what its part says so far. Thoughts are signed by nobody."""
    match part.kind:
        case "text":
            return {"type": "text", "text": part.text}
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        case "call":
            called = {"id": part.call_id, "name": part.name}
            return {"type": "tool_use", **called, "input": _input(part.text)}


def _input(arguments: str) -> Any:
    """The object that a call's arguments are; one that is cut off is none."""
    try:
        return msgspec.json.decode(arguments or "{}")
    except ValueError:
        return {}


def _stopped(end: End) -> dict[str, Any]:
    reason = "stop_sequence" if end.stop is not None else _REASONS[end.reason]
    return {"stop_reason": reason, "stop_sequence": end.stop}


def _usage(used: Usage) -> dict[str, int]:
    """Cached tokens of the prompt are apart from the others here."""
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
    }
