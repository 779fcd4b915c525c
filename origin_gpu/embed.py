"""Vectors of texts, made by the engine and sent in one event. Keeps nothing."""

from __future__ import annotations

from infire.notes import EmbedTexts
from origin_gpu.handover import WorkerEvent, WorkerRequest
from origin_gpu.worker import Answered, Worker
from routing import wire
from routing.link_server import Stream

EMBEDDED = "embedded"  # the outcome of a request that went well


class EmbedRole:
    """Makes vectors."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def serve(
        self, request: wire.Embed, stream: Stream[WorkerRequest, WorkerEvent], answered: Answered
    ) -> None:
        """Answer `Embedded`. Raises Failure."""
        made = await self._worker.engine.embed(to_texts(request))
        stream.send(
            wire.Embedded(
                vectors=made.vectors,
                width=made.width,
                pooling=made.pooling,
                prompt_tokens=request.num_prompt,
            )
        )
        answered.outcome = EMBEDDED


def to_texts(request: wire.Embed) -> EmbedTexts:
    """The one conversion of what an edge asks into what an encoder computes."""
    return EmbedTexts(request_id=request.request_id, texts=request.texts, pooling=request.pooling)
