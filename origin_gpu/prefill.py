"""The prefill role: compute a prompt and its first token, then hold the KV until it is collected.

The front's stream stays open for as long as KV is held. Whoever ends first ends the hold: the
collector by having got everything, the front by hanging up when the request is over before that, or
the lease when both are dead.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import msgspec

from infire.notes import Exported, Submit
from infire.request import Reason, Sequence, Step
from origin_gpu.engine_link import Run
from origin_gpu.handover import (
    Collected,
    Computing,
    KVTicket,
    Prefilled,
    WorkerEvent,
    WorkerRequest,
)
from origin_gpu.kv_offer import Offer
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream

_Stream: TypeAlias = Stream[WorkerRequest, WorkerEvent]


class PrefillRole:
    """Prefills for others, and holds what they have not collected."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def serve(
        self,
        request: wire.Generate,
        stream: _Stream,
        answered: Answered,
    ) -> None:
        """Answer `Prefilled` at once, and `Collected` when the KV is gone. Raises Failure.

        Of a long prompt, `Computing` goes ahead.
        """
        sequence = self._worker.sequence(request)
        one = _one_token(sequence)
        num_bytes = self._worker.engine.must_be_up().layout.exported_bytes(len(one.token_ids))
        with self._worker.kv_files.new(num_bytes) as path:
            submit = Submit(one, export_path=str(path) if one.hold else None)
            async with self._worker.engine.request(submit, answered.heard) as run:
                with self._worker.door.offer(self._ticket(run, one), path) as offer:
                    run.on_export = partial(_wrote, offer, stream)
                    step = await run.wait_finished()
                    if reason := _reason(sequence, step):
                        stream.send(_finished(request, sequence, step, reason))
                        answered.outcome = reason
                        return
                    await self._hold(offer, step, stream)
        stream.send(Collected())
        answered.outcome = "collected"

    async def _hold(self, offer: Offer, step: Step, stream: _Stream) -> None:
        """Give out a ticket, and wait until it is used. Failure when nobody uses it in time."""
        offer.held = True
        ticket = offer.ticket
        assert step.num_computed == ticket.num_tokens
        # The last piece is written after this step; that it is may have been heard by now.
        piece_ends = tuple(dict.fromkeys((*offer.piece_ends, ticket.num_tokens)))
        stream.send(
            Prefilled(
                first=to_tokens(step),
                cached_tokens=step.cached_tokens,
                ticket=ticket,
                piece_ends=piece_ends if len(piece_ends) > 1 else (),
            )
        )
        with offer.leased():
            await offer.collected.wait()
            return
        detail = (
            f"nobody has been collecting the KV of {ticket.request_id} for {ticket.lease_s:g} s"
        )
        raise Failure(Code.LOST, detail)

    def _ticket(self, run: Run, sequence: Sequence) -> KVTicket:
        worker = self._worker
        layout = worker.engine.must_be_up().layout
        num_tokens = len(sequence.token_ids)
        return KVTicket(
            worker=worker.settings.name,
            url=worker.known_url,
            request_id=run.key,
            epoch=worker.engine.epoch,
            num_tokens=num_tokens,
            num_bytes=layout.exported_bytes(num_tokens),
            layout=layout,
            lease_s=worker.settings.lease_s,
            parts=(layout.tp_rank,),  # an engine of several ranks would export as many files
        )


def _wrote(offer: Offer, stream: _Stream, exported: Exported) -> None:
    """More of the KV is in its file: the first time, whoever is to collect it may begin."""
    if not offer.piece_ends and exported.num_tokens < offer.ticket.num_tokens:
        ticket = msgspec.structs.replace(offer.ticket, num_ready=exported.num_tokens)
        stream.send(Computing(ticket))
    offer.wrote(exported.num_bytes, exported.num_tokens)


def _finished(request: wire.Generate, sequence: Sequence, step: Step, reason: Reason) -> Prefilled:
    """The answer to a request that ends with its first token."""
    usage = to_usage(request, sequence.num_output + 1, step.cached_tokens)
    return Prefilled(
        first=to_tokens(step),
        cached_tokens=step.cached_tokens,
        finish=wire.Finish(reason, usage),
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
