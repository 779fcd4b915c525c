"""An answer as parts in order: texts, thoughts, calls of functions. Pure; knows no API.

Pieces come one after another; a part goes on until a piece of another kind begins the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from edge.ask import Piece, Reasoning, Text, TokenLogprob, ToolArguments, ToolEnd, ToolStart

Kind = Literal["text", "reasoning", "call"]

_KINDS: dict[type, Kind] = {
    Text: "text",
    Reasoning: "reasoning",
    ToolStart: "call",
    ToolArguments: "call",
}


@dataclass(slots=True, kw_only=True)
class Part:
    kind: Kind
    index: int  # among the parts of its answer
    call_id: str = ""  # of a call, as is its name
    name: str = ""
    is_whole: bool = False  # of a call: its arguments are
    said: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says so far; of a call, its arguments."""
        return "".join(self.said)


class Parts:
    """The parts so far. At most the last one goes on."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self.open: Part | None = None
        self._waiting: tuple[TokenLogprob, ...] = ()  # for text to go beside

    def told(self, piece: Piece) -> Piece | None:
        """`piece` as a part takes it; None where it says nothing, or nothing yet.

        Log probabilities beside no text begin no part: they wait for the text that follows. Those
        of thoughts and calls, which have none, wait in vain.
        """
        if not isinstance(piece, Text):
            self._waiting = ()
            return None if is_empty(piece) else piece
        if self._waiting:
            piece = Text(text=piece.text, logprobs=self._waiting + piece.logprobs)
        goes_on = bool(piece.logprobs) and self.goes_on(piece)
        self._waiting = () if piece.text or goes_on else piece.logprobs
        return piece if piece.text or goes_on else None

    def goes_on(self, piece: Piece) -> bool:
        """Whether `piece` is more of the open part, else it begins another."""
        same = self.open is not None and self.open.kind == _KINDS[type(piece)]
        return same and not isinstance(piece, ToolStart)

    def begin(self, piece: Piece) -> Part:
        """The part that begins with `piece`, which is still to be added; now the open one."""
        self.open = Part(kind=_KINDS[type(piece)], index=len(self.all))
        if isinstance(piece, ToolStart):
            self.open.call_id, self.open.name = piece.id, piece.name
        self.all.append(self.open)
        return self.open

    def add(self, piece: Piece) -> Part:
        """Write `piece` into the open part, which it goes on with."""
        part = self.open
        assert part is not None
        if isinstance(piece, Text):
            part.logprobs += piece.logprobs
        if isinstance(piece, Text | Reasoning | ToolArguments):
            part.said.append(piece.text)
        return part

    def close(self, *, whole: bool = False) -> Part | None:
        """The open part is over; of a call, whether it is `whole`."""
        part, self.open, self._waiting = self.open, None, ()
        if part is not None:
            part.is_whole = whole
        return part

    def gather(self, pieces: Iterable[Piece]) -> None:
        """Take all of these, which tell parts; texts of nothing begin none."""
        for one in pieces:
            if isinstance(one, ToolEnd):
                self.close(whole=True)
            elif (piece := self.told(one)) is not None:
                if not self.goes_on(piece):
                    self.begin(piece)
                self.add(piece)


def is_empty(piece: Piece) -> bool:
    """Whether it says nothing, so that no part should begin for its sake."""
    match piece:
        case Text(text=text, logprobs=logprobs):
            return not text and not logprobs
        case Reasoning(text=text) | ToolArguments(text=text):
            return not text
        case _:
            return False
