"""The engine of a model that makes vectors: requests in, batches of texts, vectors out.

In the place of `infire.engine`: there is no KV, and no step that depends on the last. Knows no
socket; of tensors, only what `Model` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from infire.embed_queue import EmbedQueue
from infire.notes import (
    Answer,
    Drop,
    Embedded,
    EmbedTexts,
    Gauges,
    Note,
    Pooling,
    Refused,
    Results,
    Submit,
)


class Model(Protocol):
    """What computes. `infire.load_encoder.VectorModel` and a counting one of the tests are two."""

    @property
    def width(self) -> int:
        """Numbers of a vector."""

    @property
    def pooling(self) -> Pooling:
        """Where a request says nothing."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_window(self) -> int:
        """Tokens of the longest text."""

    def vectors(self, texts: Seq[Seq[int]], poolings: Seq[Pooling]) -> list[bytes]:
        """A vector of each text: float32, little-endian."""


@dataclass(slots=True)
class _Asked:
    request: EmbedTexts
    vectors: list[bytes | None] = field(default_factory=list)
    num_missing: int = 0


class EmbedEngine:
    """Requests (`EmbedTexts`, `Drop`) come between batches; each is answered once, when whole."""

    def __init__(
        self,
        model: Model,
        *,
        max_batch_tokens: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._clock = clock
        self._queue = EmbedQueue()
        self._asked: dict[str, _Asked] = {}
        self._answers: list[Answer] = []
        self._num_batches = 0
        self._num_tokens = 0
        self._batch_s = 0.0

    def do(self, note: Note) -> None:
        match note:
            case EmbedTexts():
                self._add(note)
            case Drop(request_id):
                self._asked.pop(request_id, None)
                self._queue.drop(request_id)
            case Submit(sequence):
                self._refuse(sequence.request_id, "this model makes vectors, and no text")

    def step(self) -> Results | None:
        """Compute one batch. None when there was nothing to compute and nothing to answer."""
        batch = self._queue.take(self._max_batch_tokens)
        if batch:
            began = self._clock()
            self._compute(batch)
            self._batch_s = self._clock() - began
        if not batch and not self._answers:
            return None
        answers, self._answers = tuple(self._answers), []
        return Results(self.gauges(), answers=answers)

    def rest(self) -> bool:
        """There is nothing to do ahead."""
        return False

    def close(self) -> None:
        """There is nothing to write."""

    def gauges(self) -> Gauges:
        return Gauges(
            step=self._num_batches,
            running=len(self._asked) - self._queue.num_requests,
            waiting=self._queue.num_requests,
            prompt_tokens_computed=self._num_tokens,
            step_s=self._batch_s,
        )

    def _add(self, request: EmbedTexts) -> None:
        if why := self._wrong(request):
            self._refuse(request.request_id, why)
            return
        count = len(request.texts)
        self._asked[request.request_id] = _Asked(request, [None] * count, count)
        self._queue.add(request.request_id, [len(text) for text in request.texts])

    def _wrong(self, request: EmbedTexts) -> str | None:
        """Why a request can never be computed."""
        model = self._model
        if not request.texts:
            return "there are no texts"
        for n, ids in enumerate(request.texts):
            if not ids:
                return f"text {n} has no tokens"
            if len(ids) > model.context_window:
                return f"text {n} of {len(ids)} tokens exceeds {model.context_window}"
            if not 0 <= min(ids) <= max(ids) < model.vocab_size:
                return f"text {n} has ids beyond a vocabulary of {model.vocab_size}"
        return None

    def _compute(self, batch: Seq[tuple[str, int]]) -> None:
        asked = [(self._asked[request_id], n) for request_id, n in batch]
        texts = [it.request.texts[n] for it, n in asked]
        poolings = [it.request.pooling or self._model.pooling for it, _ in asked]
        for (it, n), vector in zip(asked, self._model.vectors(texts, poolings), strict=True):
            it.vectors[n] = vector
            it.num_missing -= 1
            if not it.num_missing:
                self._finish(it)
        self._num_batches += 1
        self._num_tokens += sum(map(len, texts))

    def _finish(self, it: _Asked) -> None:
        request = it.request
        del self._asked[request.request_id]
        self._answers.append(
            Embedded(
                request_id=request.request_id,
                vectors=b"".join(vector for vector in it.vectors if vector is not None),
                width=self._model.width,
                pooling=request.pooling or self._model.pooling,
            )
        )

    def _refuse(self, request_id: str, detail: str) -> None:
        self._answers.append(Refused(request_id, "bad_input", detail))
