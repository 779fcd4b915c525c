"""The decode role: collect the KV that another worker computed, then make the rest of the tokens.

It computes no prompt token. Where to collect from is looked up in the table that the front gave,
never read from a ticket.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import msgspec

from infire.request import Step
from origin_gpu.handover import KVTicket, Peer, Prefilled, WorkerEvent, WorkerRequest
from origin_gpu.kv_transfer import Collect, collect
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream


class DecodeRole:
    """Goes on from tickets, and does both parts of requests that have none."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.peers: Mapping[str, Peer] = {}  # by name

    async def serve(
        self,
        request: wire.Generate,
        prefilled: Prefilled,
        stream: Stream[WorkerRequest, WorkerEvent],
        answered: Answered,
    ) -> None:
        """The tokens after `prefilled`, then `Finish`. Raises Failure."""
        ticket = prefilled.ticket
        if ticket is None:
            raise Failure(Code.BAD_INPUT, "a resume without a ticket")
        address = self._address(ticket)
        layout_digest = self._matching_layout(ticket)
        # What has been sampled so far, the first token last: its KV alone is not computed yet.
        so_far = msgspec.structs.replace(
            request, generated_ids=(*request.generated_ids, *prefilled.first.ids)
        )
        num_known = len(so_far.token_ids) + len(so_far.generated_ids)
        if ticket.num_tokens != num_known - 1:
            raise Failure(
                Code.INCOMPATIBLE, f"KV of {ticket.num_tokens} tokens for {num_known} known ids"
            )
        wanted = Collect(
            secret=self._worker.secret,
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            layout_digest=layout_digest,
        )
        path = self._worker.kv_files / f"in-{uuid.uuid4().hex}"
        try:
            await collect(address, wanted, ticket.num_bytes, path)
            sequence = self._worker.sequence(so_far)
            last = await self._worker.run_sequence(
                sequence,
                lambda step: _pass_on(step, stream, answered),
                kv_path=path,
                num_adopted=ticket.num_tokens,
            )
        finally:
            path.unlink(missing_ok=True)
        _end(so_far, last, stream, answered, prefilled.cached_tokens)

    async def serve_whole(
        self,
        request: wire.Generate,
        stream: Stream[WorkerRequest, WorkerEvent],
        answered: Answered,
    ) -> None:
        """Prefill and decode here. Raises Failure."""

        def on_step(step: Step) -> None:
            if not answered.output_tokens:
                stream.send(wire.Started(step.cached_tokens))
            _pass_on(step, stream, answered)

        last = await self._worker.run_sequence(self._worker.sequence(request), on_step)
        _end(request, last, stream, answered, last.cached_tokens)

    def _address(self, ticket: KVTicket) -> str:
        """The KV door of the ticket's worker, from our own table."""
        peer = self.peers.get(ticket.worker)
        if peer is None:
            raise Failure(Code.LOST, f"{ticket.worker} is not among this region's workers")
        if peer.url != ticket.url:
            raise Failure(
                Code.INCOMPATIBLE, f"{ticket.worker} is at {peer.url}, its ticket says {ticket.url}"
            )
        return peer.kv_address

    def _matching_layout(self, ticket: KVTicket) -> str:
        """The digest of our own layout. Failure(INCOMPATIBLE) when the ticket's is another."""
        hello = self._worker.engine.hello
        if hello is None:
            raise Failure(Code.UNAVAILABLE, "the engine is not up", retry_after_s=1.0)
        if hello.layout.digest != ticket.layout.digest:
            raise Failure(
                Code.INCOMPATIBLE, f"KV of layout {ticket.layout}, here it is {hello.layout}"
            )
        return hello.layout.digest


def _pass_on(step: Step, stream: Stream[WorkerRequest, WorkerEvent], answered: Answered) -> None:
    answered.output_tokens += len(step.ids)
    stream.send(to_tokens(step))


def _end(
    request: wire.Generate,
    last: Step,
    stream: Stream[WorkerRequest, WorkerEvent],
    answered: Answered,
    cached_tokens: int,
) -> None:
    assert last.finish is not None
    num_output = len(request.generated_ids) + answered.output_tokens
    stream.send(wire.Finish(last.finish, to_usage(request, num_output, cached_tokens)))
    answered.outcome = last.finish
