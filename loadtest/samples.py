"""What is measured of one streamed answer. Knows the stream's form; no socket, no locust."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

Clock = Callable[[], float]  # seconds; only differences count


class Sample(Struct, frozen=True, kw_only=True):
    """One request. Times are seconds of the clock given."""

    client: str  # where it came from
    region: str  # which served it; empty when none did
    sent: float
    ended: float
    texts: tuple[float, ...] = ()  # when each piece of text came
    completion_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.texts[0] - self.sent if self.texts else None

    @property
    def gaps_s(self) -> list[float]:
        """Between two pieces of text: the inter-token latency that a reader sees."""
        return [after - before for before, after in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def tokens_per_s(self) -> float | None:
        """While the text flowed: the first token came with the prefill, so n tokens are n - 1."""
        flowed = self.texts[-1] - self.texts[0] if self.texts else 0.0
        return (self.completion_tokens - 1) / flowed if flowed > 0 else None


class Refused(Exception):
    """The answer is no stream, or one that says what went wrong."""


class Reading:
    """Takes in the lines of a native stream as they come."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.texts: list[float] = []
        self.completion_tokens = 0

    def read(self, lines: Iterable[bytes]) -> None:
        """To the end of the stream. Refused when it has none, or tells of an error."""
        for line in lines:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            if data and data != line.strip():
                self._take(msgspec.json.decode(data))
        raise Refused("stream ended without [DONE]")

    def _take(self, event: dict[str, Any]) -> None:
        if "errors" in event or "error" in event:
            raise Refused(f"error in the stream: {msgspec.json.encode(event).decode()}")
        if event.get("response"):
            self.texts.append(self._clock())
        if usage := event.get("usage"):
            self.completion_tokens = usage["completion_tokens"]


def write_line(sample: Sample) -> bytes:
    return msgspec.json.encode(sample) + b"\n"


def read_samples(path: Path) -> Iterator[Sample]:
    """Those in a file of lines; none when no request was made."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            yield msgspec.json.decode(line, type=Sample)
