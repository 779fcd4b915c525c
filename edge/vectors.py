"""What of the endpoint is for vectors alone: OpenAI's form of asking for them, and the reply.

Knows no region, and not how vectors are spelled.
"""

from __future__ import annotations

import time

from anyio import to_thread
from starlette.types import Scope, Send

from edge import embeddings
from edge.api import Api
from edge.complete import Caller
from edge.embed import EmbedWalk
from edge.embeddings import EmbedAsk
from edge.metrics import Record
from edge.response import send_whole
from routing.errors import Failure

_INLINE_BYTES = 40_000  # of vectors: about 1 ms to spell; more would hold up every other stream


class Embeddings(Api):
    """OpenAI's."""

    route = "embeddings"

    def parse(self, body: bytes, scope: Scope) -> EmbedAsk:
        return embeddings.parse(body)


class VectorReply:
    """The response: one JSON body, once all vectors are there."""

    begun = False  # what fails has a status of its own

    def __init__(self, send: Send, record: Record) -> None:
        self._send = send
        self._record = record

    async def run(self, embeds: EmbedWalk, ask: EmbedAsk, caller: Caller) -> None:
        made, region = await embeds.embed(ask, caller, self._record.tries)
        if len(made.vectors) <= _INLINE_BYTES:
            data = embeddings.spelled(ask, made)
        else:
            data = await to_thread.run_sync(embeddings.spelled, ask, made)
        self._record.note_piece(region, time.monotonic())
        await send_whole(self._send, data, region)

    async def fail(self, failure: Failure) -> None:
        raise failure
