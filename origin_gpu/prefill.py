"""The prefill role: compute a prompt and its first token, then hold the KV until it is collected.

The front's stream stays open for as long as KV is held. Whoever ends first ends the hold: the
collector by having got everything, the front by hanging up, or the lease when both are dead.
"""

from __future__ import annotations

import msgspec

from infire.notes import Submit
from infire.request import Reason, Sequence, Step
from origin_gpu.engine_link import Run
from origin_gpu.handover import Collected, KVTicket, Prefilled, WorkerEvent, WorkerRequest
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream


class PrefillRole:
    """Prefills for others, and holds what they have not collected."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def serve(
        self,
        request: wire.Generate,
        stream: Stream[WorkerRequest, WorkerEvent],
        answered: Answered,
    ) -> None:
        """Answer `Prefilled` at once, and `Collected` when the KV is gone. Raises Failure."""
        sequence = self._worker.sequence(request)
        submit = Submit(_one_token(sequence))
        async with self._worker.engine.request(submit, answered.heard) as run:
            step = await run.wait_finished()
            if reason := _reason(sequence, step):
                usage = to_usage(request, sequence.num_output + 1, step.cached_tokens)
                stream.send(
                    Prefilled(
                        first=to_tokens(step),
                        cached_tokens=step.cached_tokens,
                        finish=wire.Finish(reason, usage),
                    )
                )
                answered.outcome = reason
                return
            await self._hold(run, step, stream)
        stream.send(Collected())
        answered.outcome = "collected"

    async def _hold(self, run: Run, step: Step, stream: Stream[WorkerRequest, WorkerEvent]) -> None:
        """Give out a ticket, and wait until it is used. Failure when nobody uses it in time."""
        worker = self._worker
        ticket = self._ticket(run, step)
        with (
            worker.kv_files.new(ticket.num_bytes) as path,
            worker.door.offer(ticket, path) as offer,
        ):
            stream.send(
                Prefilled(first=to_tokens(step), cached_tokens=step.cached_tokens, ticket=ticket)
            )
            with offer.leased():
                await run.export(path)
                offer.exported()
                await offer.collected.wait()
                return
        raise Failure(
            Code.LOST, f"nobody has been collecting the KV of {run.key} for {ticket.lease_s:g} s"
        )

    def _ticket(self, run: Run, step: Step) -> KVTicket:
        worker = self._worker
        layout = worker.engine.must_be_up().layout
        return KVTicket(
            worker=worker.settings.name,
            url=worker.known_url,
            request_id=run.key,
            epoch=worker.engine.epoch,
            num_tokens=step.num_computed,
            num_bytes=layout.exported_bytes(step.num_computed),
            layout=layout,
            lease_s=worker.settings.lease_s,
            parts=(layout.tp_rank,),  # an engine of several ranks would export as many files
        )


def _one_token(sequence: Sequence) -> Sequence:
    """To be computed up to its next token, whatever that is, and then held if more may follow."""
    max_tokens = sequence.num_output + 1
    return msgspec.structs.replace(
        sequence,
        sampling=msgspec.structs.replace(sequence.sampling, max_tokens=max_tokens),
        hold=sequence.sampling.max_tokens > max_tokens,
    )


def _reason(sequence: Sequence, step: Step) -> Reason | None:
    """Why the request ends with its first token, if it does."""
    if step.finish == "stop":
        return "stop"
    return "length" if sequence.num_output + 1 >= sequence.sampling.max_tokens else None
