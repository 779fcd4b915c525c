"""Texts on their way through a region, to a worker that makes vectors of them.

Where that is lost, or refuses, another is asked, once; one that is being stopped costs no try.
"""

from __future__ import annotations

from time import monotonic

import anyio
import msgspec

from origin_gpu.embed import EMBEDDED
from origin_gpu.handover import WorkerEvent
from origin_gpu.place import place_embed
from origin_gpu.pool import Pool
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream


class EmbedPassage:
    """Carries one request, and knows how far it has come."""

    def __init__(self, pool: Pool, stream: Stream[wire.Embed, wire.Event]) -> None:
        self.request = stream.request
        self.reason: str | None = None  # "embedded", once it has ended well
        self.worker: str | None = None  # that was asked last
        self.second_try: Failure | None = None  # what made one necessary
        self._pool = pool
        self._stream = stream
        self._began = monotonic()

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._began

    @property
    def told(self) -> dict[str, object]:
        """What a log line says of it, besides what it says of any request."""
        return {"worker": self.worker, "texts": len(self.request.texts)}

    async def carry(self) -> None:
        """Return when the request has ended well. Failure: what its client is to be told."""
        budget_s = self.request.budget_s
        try:
            with anyio.fail_after(budget_s):
                await self._carry()
        except TimeoutError:
            detail = f"no vectors after {budget_s:g} s, when the time was up"
            raise Failure(Code.TIMEOUT, detail) from None

    async def _carry(self) -> None:
        asked: set[str] = set()
        failure: Failure | None = None
        while True:
            try:
                worker = place_embed(self._pool.candidates(excluding=asked), self.request)
            except Failure as none:
                raise failure or none from None
            if failure is not None and failure.code is not Code.DRAINING:
                self.second_try = failure
            asked.add(worker)
            try:
                return await self._ask(worker)
            except Failure as failed:
                failure = failed
            if not failure.code.elsewhere:
                raise failure
            if failure.code is Code.DRAINING:
                self._pool.leave_out(worker)
            elif self.second_try is not None:
                raise failure

    async def _ask(self, worker: str) -> None:
        answers: list[WorkerEvent] = []
        answered = anyio.Event()

        def hear(event: WorkerEvent | None) -> None:
            if event is not None:
                answers.append(event)
            answered.set()

        self.worker = worker
        budget_s = max(0.0, self.request.budget_s - self.elapsed_s)
        request = msgspec.structs.replace(self.request, budget_s=budget_s)
        with self._pool.charge(worker, request.num_prompt):
            call = self._pool.open(worker, request, hear)
            try:
                await answered.wait()
            finally:
                call.cancel()
        match answers:
            case [wire.Embedded() as embedded, *_]:
                self._stream.send(embedded)
                self.reason = EMBEDDED
            case [wire.Fault(code, detail, retry_after_s), *_]:
                raise Failure(code, detail, retry_after_s=retry_after_s)
            case _:
                raise Failure(Code.LOST, f"{worker} ended a request without an answer")
