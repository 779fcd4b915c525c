"""What the tests of event streams share: their parsing, and one answer cut in many ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from random import Random
from typing import Any

from edge.ask import Piece, Reasoning, Text, ToolArguments, ToolEnd, ToolStart

_WHOLE: tuple[Piece, ...] = (
    Reasoning(text="Let me see… ☃"),
    Text(text='Hello, "wörld"\n🙂 done'),
    ToolStart(index=0, id="call_a", name="f"),
    ToolArguments(index=0, text='{"x": [1, 2, "\\u00e9"]}'),
    ToolEnd(index=0),
    ToolStart(index=1, id="call_b", name="g"),
    ToolArguments(index=1, text="{}"),
    ToolEnd(index=1),
)


def events(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each named event."""
    *parts, rest = stream.decode().split("\n\n")
    assert rest == ""
    told = []
    for part in parts:
        name, data = part.split("\n")
        told.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return told


def cuts(random: Random, times: int) -> Iterator[list[Piece]]:
    """One answer, each time in other pieces, some of which say nothing."""
    for _ in range(times):
        yield [part for piece in _WHOLE for part in _cut(random, piece)]


def _cut(random: Random, piece: Piece) -> list[Piece]:
    if not isinstance(piece, Text | Reasoning | ToolArguments):
        return [piece]
    size = len(piece.text)
    at = sorted([0, size, *(random.randrange(size + 1) for _ in range(random.randrange(6)))])
    texts = [piece.text[a:b] for a, b in pairwise(at)]
    match piece:
        case Text():
            return [Text(text=text) for text in texts]
        case Reasoning():
            return [Reasoning(text=text) for text in texts]
        case ToolArguments(index=index):
            return [ToolArguments(index=index, text=text) for text in texts]
