"""What a public API does to spell one answer: pieces in, bytes out. Pure; knows no API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from edge.ask import End, Piece


class Spelled(ABC):
    """One answer in an API's own words."""

    def began(self, num_prompt: int) -> None:  # noqa: B027  most APIs tell that at the end
        """The prompt has so many tokens: said once, ahead of all else."""

    @abstractmethod
    def frames(self, piece: Piece) -> bytes:
        """The events that tell `piece`, b"" for none."""

    @abstractmethod
    def text_frame(self, text: str) -> bytes:
        """The event that tells more text, as `frames` would, but sooner; b"" where it takes more
        than one. It may come to nothing: only what `told` repeats was sent."""

    def told(self, text: str) -> None:  # noqa: B027  most APIs repeat nothing
        """What `text_frame` made of this text was sent."""

    @abstractmethod
    def whole(self, pieces: Iterable[Piece], end: End) -> bytes:
        """The JSON body of an answer that was not streamed."""
