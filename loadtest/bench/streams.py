"""Timing one streamed answer of any server that speaks OpenAI's chat completions. No socket.

It runs on the cores that it measures, so it looks at bytes: an event with text is counted by a
regular expression, and JSON is decoded once an answer, for the usage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

# A delta whose text is not empty. Quotes inside texts are escaped, so no text can look like it.
_TEXT = re.compile(rb'"content": ?"(?!")').search
_USAGE = re.compile(rb'"usage": ?\{').search
_ERROR = re.compile(rb'"error": ?[{"]').search


class BrokenStream(Exception):
    """The answer tells of an error, or ends too early. Says what came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request. Times are seconds of one clock."""

    sent: float
    texts: tuple[float, ...]  # when each piece of text came
    ended: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.texts[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Between two pieces of text: the inter-token latency that a reader sees."""
        return [after - before for before, after in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first text. None of an answer of one token.

        To the end of the answer, not to its last text: last tokens may have no text.
        """
        flowed = self.ended - self.texts[0]
        return (self.completion_tokens - 1) / flowed if self.completion_tokens > 1 else None


class StreamReader:
    """Takes in the bytes of one answer as they come."""

    def __init__(self, sent: float, *, marks_end: bool = True) -> None:
        self._sent = sent
        self._marks_end = marks_end
        self._partial = b""
        self._texts: list[float] = []
        self._usage: dict[str, Any] = {}
        self._done = False

    def feed(self, chunk: bytes, now: float) -> None:
        """`chunk` came at `now`. BrokenStream when it tells of an error."""
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line, now)

    def end(self, now: float) -> Answered:
        """What was measured. BrokenStream of an answer without an end, a text or a usage."""
        if not (self._texts and self._usage and (self._done or not self._marks_end)):
            raise BrokenStream(
                f"{len(self._texts)} texts, usage {self._usage or 'missing'}, "
                f"{'' if self._done else 'no '}[DONE]"
            )
        return Answered(
            sent=self._sent,
            texts=tuple(self._texts),
            ended=now,
            prompt_tokens=self._usage["prompt_tokens"],
            completion_tokens=self._usage["completion_tokens"],
        )

    def _take(self, line: bytes, now: float) -> None:
        if _TEXT(line):
            self._texts.append(now)
        elif _ERROR(line):
            raise BrokenStream(line.decode(errors="replace"))
        elif line.strip().endswith(b"[DONE]"):
            self._done = True
        if _USAGE(line):
            self._usage = msgspec.json.decode(line.removeprefix(b"data:"))["usage"]
