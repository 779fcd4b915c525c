"""The pieces of an answer that is whole, put together. Pure; knows no API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge.ask import Piece, Reasoning, Said, Text, TokenLogprob, ToolArguments, ToolEnd, ToolStart


@dataclass(slots=True, kw_only=True)
class Call:
    """A call of a tool as far as it came."""

    id: str
    name: str
    arguments: str = ""  # JSON of an object, where it is whole
    whole: bool = False

    @property
    def text(self) -> str:
        """What there is of a call that is not whole, for who can take whole ones only."""
        name = msgspec.json.encode(self.name).decode()
        return f'{{"name": {name}, "arguments": {self.arguments}'

    @property
    def native(self) -> dict[str, Any] | None:
        """With its arguments as an object; None where they are not whole."""
        if not self.whole:
            return None
        arguments = msgspec.Raw(self.arguments.encode())  # as the model wrote it, number for number
        return {"name": self.name, "arguments": arguments, "id": self.id}


@dataclass(slots=True, kw_only=True)
class Gathered:
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


def joined(said: Iterable[Said]) -> list[Said]:
    """The same in as few pieces as may be."""
    made: list[Said] = []
    for piece in said:
        match made[-1:], piece:
            case [Text() as last], Text():
                logprobs = last.logprobs + piece.logprobs
                made[-1] = Text(text=last.text + piece.text, logprobs=logprobs)
            case [Reasoning() as last], Reasoning():
                made[-1] = Reasoning(text=last.text + piece.text)
            case [ToolArguments() as last], ToolArguments():
                made[-1] = ToolArguments(index=last.index, text=last.text + piece.text)
            case _:
                made.append(piece)
    return made


def gather(pieces: Iterable[Piece]) -> Gathered:
    texts: list[str] = []
    thoughts: list[str] = []
    arguments: list[list[str]] = []
    made = Gathered()
    for piece in pieces:
        match piece:
            case Text(text=text, logprobs=logprobs):
                texts.append(text)
                made.logprobs += logprobs
            case Reasoning(text=text):
                thoughts.append(text)
            case ToolStart(id=known, name=name):
                made.calls.append(Call(id=known, name=name))
                arguments.append([])
            case ToolArguments(index=index, text=text):
                arguments[index].append(text)
            case ToolEnd(index=index):
                made.calls[index].whole = True
    made.text, made.reasoning = "".join(texts), "".join(thoughts)
    for call, parts in zip(made.calls, arguments, strict=True):
        call.arguments = "".join(parts)
    return made
