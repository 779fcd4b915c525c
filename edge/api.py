"""What differs between routes that run a model: how a body is read, how an answer is spelled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from starlette.types import Scope

from edge.ask import Ask
from edge.choices import Choice
from edge.embeddings import EmbedAsk
from edge.spelled import Spelled


class Api(ABC):
    route: str  # as in logs and metrics

    def model(self, scope: Scope) -> str | None:
        """The model, where the path names it."""
        return None

    @abstractmethod
    def parse(self, body: bytes, scope: Scope) -> Ask | EmbedAsk:
        """What the client asks; raises Failure(BAD_INPUT) naming the field that is wrong."""

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        """How an answer in text is spelled."""
        raise AssertionError(f"{self.route} parses no body into an ask for text")

    def choices(self, asks: Sequence[Ask], request_id: str) -> Sequence[Choice]:
        """The same of an answer with several choices."""
        raise AssertionError(f"{self.route} parses no body into several choices")
