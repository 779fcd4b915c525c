"""The prefill role: compute a prompt and its first token, then hold the KV until it is collected.

The front's stream stays open for as long as KV is held. Whoever ends first ends the hold: the
collector by having got everything, the front by hanging up, or the lease when both are dead.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import msgspec

from infire.request import Sequence, Step
from origin_gpu.handover import Collected, KVTicket, Prefilled, WorkerEvent, WorkerRequest
from origin_gpu.kv_transfer import Collect, Exported
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream


@dataclass(slots=True)
class _Hold:
    """A finished prefill whose blocks are kept."""

    num_bytes: int
    epoch: str
    layout_digest: str
    collected: anyio.Event = field(default_factory=anyio.Event)


class PrefillRole:
    """Prefills for others, and holds what they have not collected. The KV door's `Holder`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._holds: dict[str, _Hold] = {}  # by the engine's request id

    async def serve(
        self,
        request: wire.Generate,
        stream: Stream[WorkerRequest, WorkerEvent],
        answered: Answered,
    ) -> None:
        """Answer `Prefilled` at once, and `Collected` when the KV is gone. Raises Failure."""
        worker = self._worker
        sequence = _one_token(worker.sequence(request, hold=True))
        try:
            step = await worker.run_sequence(sequence, lambda step: None)
            answered.output_tokens = len(step.ids)
            if finish := _finish(request, step):
                stream.send(
                    Prefilled(
                        first=to_tokens(step), cached_tokens=step.cached_tokens, finish=finish
                    )
                )
                answered.outcome = finish.reason
                return
            await self._hold(sequence, step, stream)
            answered.outcome = "collected"
        finally:
            worker.engine.drop(sequence.request_id)

    @asynccontextmanager
    async def export(self, wanted: Collect) -> AsyncGenerator[Exported, None]:
        """The held KV that `wanted` names, as a file for the length of the block."""
        hold = self._holds.get(wanted.request_id)
        if hold is None:
            raise Failure(Code.LOST, f"KV of {wanted.request_id} is not held here (any more)")
        if wanted.epoch != hold.epoch:
            raise Failure(Code.LOST, f"KV of {wanted.request_id} is of another life of its engine")
        if wanted.layout_digest != hold.layout_digest:
            ours, theirs = hold.layout_digest[:12], wanted.layout_digest[:12]
            raise Failure(Code.INCOMPATIBLE, f"KV of layout {ours}, the collector's is {theirs}")
        path = self._worker.kv_files / f"out-{uuid.uuid4().hex}"
        try:
            num_bytes = await self._worker.engine.export(wanted.request_id, str(path))
            if num_bytes is None:
                raise Failure(Code.LOST, f"KV of {wanted.request_id} is not held any more")
            yield Exported(path, num_bytes)
        finally:
            path.unlink(missing_ok=True)

    def collected(self, request_id: str) -> None:
        if hold := self._holds.get(request_id):
            hold.collected.set()

    async def _hold(
        self, sequence: Sequence, step: Step, stream: Stream[WorkerRequest, WorkerEvent]
    ) -> None:
        """Give out a ticket, and wait until it is used. Failure when nobody uses it in time."""
        worker, lease_s = self._worker, self._worker.settings.lease_s
        hello = worker.engine.hello
        if hello is None:
            raise Failure(Code.LOST, "the engine ended")
        num_bytes = hello.layout.exported_bytes(step.num_computed)
        hold = _Hold(num_bytes, worker.engine.epoch, hello.layout.digest)
        self._holds[sequence.request_id] = hold
        ticket = KVTicket(
            worker=worker.settings.name,
            url=worker.url,
            request_id=sequence.request_id,
            epoch=hold.epoch,
            num_tokens=step.num_computed,
            num_bytes=num_bytes,
            layout=hello.layout,
            lease_s=lease_s,
        )
        try:
            stream.send(
                Prefilled(first=to_tokens(step), cached_tokens=step.cached_tokens, ticket=ticket)
            )
            with anyio.move_on_after(lease_s):
                await hold.collected.wait()
                stream.send(Collected())
                return
            raise Failure(Code.LOST, f"nobody collected the KV within {lease_s:g} s")
        finally:
            del self._holds[sequence.request_id]


def _one_token(sequence: Sequence) -> Sequence:
    """To be computed up to its next token, whatever that is, and then held."""
    sampling = msgspec.structs.replace(
        sequence.sampling, max_tokens=sequence.num_output + 1, stop_ids=()
    )
    return msgspec.structs.replace(sequence, sampling=sampling)


def _finish(request: wire.Generate, step: Step) -> wire.Finish | None:
    """How the request ended, if its first token was also its last."""
    num_output = len(request.generated_ids) + len(step.ids)
    usage = to_usage(request, num_output, step.cached_tokens)
    if step.ids[-1] in request.sampling.stop_ids:
        return wire.Finish("stop", usage)
    if num_output >= request.sampling.max_tokens:
        return wire.Finish("length", usage)
    return None
