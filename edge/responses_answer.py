"""OpenAI's Responses: one answer as the response object, or as the events that build it up.

Pure: `Piece` to bytes. Whole or streamed, the object is the same: the last event holds it. Knows no
HTTP, no store, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from edge import envelope, sse
from edge.ask import Broke, End, Piece, Text, ToolEnd, ToolStart, Usage
from edge.openai import logprob_entry
from edge.parts import Part, Parts
from edge.responses import Turn
from edge.responses_items import Item
from edge.spelled import Spelled
from routing.errors import Code, Failure

Status = Literal["in_progress", "completed", "incomplete"]

_PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}  # of item ids, as OpenAI has them
_DELTAS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


class Answer(Spelled):
    """One response. Its items are called after it, so that whoever keeps it finds them."""

    def __init__(self, turn: Turn, *, request_id: str, created: int) -> None:
        self._turn = turn
        self._request_id = request_id
        self._parts = Parts()
        self._num_events = 0
        self._begun = False
        self._around: tuple[bytes, bytes] | None = None  # a delta of the open text
        self._logprobs = turn.sampling.logprobs is not None
        self.response: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": turn.model,
            "output": [],
            "usage": None,
            **turn.repeated,
        }

    def text_frame(self, text: str) -> bytes:
        if self._around is None:
            return b""
        before, after = self._around
        return b"%b%b%b%d}\n\n" % (before, sse.encode(text), after, self._num_events)

    def told(self, text: str) -> None:
        assert self._parts.open is not None
        self._parts.open.said.append(text)
        self._num_events += 1

    def frames(self, piece: Piece) -> bytes:
        """Named events, numbered from 0. The last one is `response.completed`, `.incomplete`, or
        `.failed` behind an `error`, which OpenAI's clients raise."""
        match piece:
            case End():
                cut = piece.reason == "length"
                return self._beginning() + self._close(cut=cut) + self._ending(piece)
            case Broke(code=code, detail=detail):
                return self._beginning() + self._failing(Failure(code, detail))
            case ToolEnd():
                return self._close(whole=True)
        told = self._parts.told(piece)
        if told is None:
            return b""
        before = self._beginning()
        if not self._parts.goes_on(told):
            before += self._close() + self._open(self._parts.begin(told))
        return before + self._delta(self._parts.add(told), told)

    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        self._parts.gather(pieces)
        return msgspec.json.encode(self._complete(end))

    def _beginning(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return b"".join(
            self._event(name, response=self.response)
            for name in ("response.created", "response.in_progress")
        )

    def _open(self, part: Part) -> bytes:
        at = self._at(part)
        item = self._item(part, "in_progress")
        self.response["output"].append(item)
        if part.kind == "call":
            return self._event("response.output_item.added", output_index=part.index, item=item)
        begun = item | {"content": []}
        added = self._event("response.output_item.added", output_index=part.index, item=begun)
        content = item["content"][0]
        if part.kind == "text" and not self._logprobs:
            self._around = self._halves(at)
        return added + self._event("response.content_part.added", **at, part=content)

    def _halves(self, at: dict[str, Any]) -> tuple[bytes, bytes]:
        """A delta without its text and its number: most events of most answers are one."""
        data = {"type": "response.output_text.delta", **at, "logprobs": [], "delta": ""}
        before, _ = sse.around(data, "delta")
        return b"event: response.output_text.delta\n" + before, b',"sequence_number":'

    def _delta(self, part: Part, piece: Piece) -> bytes:
        if isinstance(piece, ToolStart):
            return b""
        text = part.said[-1]
        if frame := self.text_frame(text):
            self._num_events += 1
            return frame
        more = {"logprobs": _logprobs(piece)} if isinstance(piece, Text) else {}
        return self._event(f"{_DELTAS[part.kind]}.delta", **self._at(part), **more, delta=text)

    def _close(self, *, cut: bool = False, whole: bool = False) -> bytes:
        """The open part is over: its whole text, its content, its item."""
        part, self._around = self._parts.close(whole=whole), None
        if part is None:
            return b""
        at, text = self._at(part), part.text
        item = self._item(part, _status(part, cut=cut))
        self.response["output"][part.index] = item
        if part.kind == "call":
            named = {"name": part.name, "arguments": text}
            said = self._event(f"{_DELTAS['call']}.done", **at, **named)
        else:
            content = item["content"][0]
            more = {"logprobs": content.get("logprobs", [])} if part.kind == "text" else {}
            said = self._event(f"{_DELTAS[part.kind]}.done", **at, text=text, **more)
            said += self._event("response.content_part.done", **at, part=content)
        over = self._event("response.output_item.done", output_index=part.index, item=item)
        return said + over

    def _ending(self, end: End) -> bytes:
        response = self._complete(end)
        return self._event(f"response.{response['status']}", response=response)

    def _failing(self, failure: Failure) -> bytes:
        says = envelope.message(failure)
        full = failure.code is Code.NO_CAPACITY
        code = "rate_limit_exceeded" if full else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": says}}
        self.response["output"] = [self._item(part, "incomplete") for part in self._parts.all]
        told = self._event("error", code=failure.code.value, message=says, param=None)
        return told + self._event("response.failed", response=self.response)

    def _complete(self, end: End) -> dict[str, Any]:
        cut = end.reason == "length"
        last = len(self._parts.all) - 1
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [
                self._item(part, _status(part, cut=cut and part.index == last))
                for part in self._parts.all
            ],
            "usage": _usage(end.usage),
        }
        return self.response

    def _item(self, part: Part, status: Status) -> Item:
        text = part.text
        item: Item = {"id": self._item_id(part), "type": "message", "status": status}
        match part.kind:
            case "call":
                call = {"call_id": part.call_id, "name": part.name, "arguments": text}
                return item | {"type": "function_call", **call}
            case "reasoning":
                thoughts = [{"type": "reasoning_text", "text": text}]
                return item | {"type": "reasoning", "summary": [], "content": thoughts}
            case "text":
                content: Item = {"type": "output_text", "text": text, "annotations": []}
                if self._logprobs:
                    content["logprobs"] = [logprob_entry(entry) for entry in part.logprobs]
                return item | {"role": "assistant", "content": [content]}

    def _item_id(self, part: Part) -> str:
        return f"{_PREFIX[part.kind]}_{self._request_id}_{part.index}"

    def _at(self, part: Part) -> dict[str, Any]:
        at: dict[str, Any] = {"item_id": self._item_id(part), "output_index": part.index}
        return at if part.kind == "call" else at | {"content_index": 0}

    def _event(self, name: str, /, **members: Any) -> bytes:
        data = {"type": name, **members, "sequence_number": self._num_events}
        self._num_events += 1
        return sse.event(data, name)


def _status(part: Part, *, cut: bool) -> Status:
    """`cut`: whether the answer was cut short in this part. A call says itself if it is whole."""
    is_whole = part.is_whole if part.kind == "call" else not cut
    return "completed" if is_whole else "incomplete"


def _logprobs(text: Text) -> list[dict[str, Any]]:
    return [logprob_entry(entry) for entry in text.logprobs]


def _usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
