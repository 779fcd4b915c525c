"""The decode role: collect the KV that another worker computed, then make the rest of the tokens.

It computes no prompt token. Where to collect from is looked up in the table that the front gave,
never read from a ticket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
import msgspec

from infire.kv_layout import KVLayout
from infire.notes import Submit
from infire.request import Step
from origin_gpu.handover import KVTicket, Peer, Prefilled, WorkerEvent, WorkerRequest
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream


class Transport(Protocol):
    """Gets KV here from where it was computed."""

    async def collect(self, ticket: KVTicket, peer: Peer, into: Path) -> str:
        """Get it as a new file at `into`, and let `peer` know that it may be forgotten there.

        Returns which way it went. Raises Failure with a code that lets the request be computed
        elsewhere.
        """


@dataclass(slots=True)
class _Fetched:
    """KV that is collected ahead of its `Resume`."""

    path: Path
    way: str | None = None  # that it went; None: it is not here
    done: anyio.Event = field(default_factory=anyio.Event)


class DecodeRole:
    """Goes on from tickets, and does both parts of requests that have none."""

    def __init__(self, worker: Worker, transport: Transport) -> None:
        self._worker = worker
        self._transport = transport
        self._fetches: dict[tuple[str, str, str], _Fetched] = {}

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
        # What has been sampled so far, the first token last: its KV alone is not computed yet.
        so_far = msgspec.structs.replace(
            request, generated_ids=(*request.generated_ids, *prefilled.first.ids)
        )
        peer = self._fitting(ticket, so_far)
        with self._worker.kv_files.new(ticket.num_bytes) as path:
            path = await self._fetched(ticket, answered) or path
            if answered.kv_s is None:
                await self._collect(ticket, peer, path, answered)
            submit = Submit(
                self._worker.sequence(so_far),
                str(path),
                ticket.num_tokens,
                part_ends=prefilled.part_ends,
            )
            on_step = partial(_pass_on, stream, answered)
            async with self._worker.engine.request(submit, on_step) as run:
                await run.wait_adopted()
                path.unlink()
                last = await run.wait_finished()
        _end(so_far, last, stream, answered, prefilled.cached_tokens)

    async def serve_whole(
        self,
        request: wire.Generate,
        stream: Stream[WorkerRequest, WorkerEvent],
        answered: Answered,
    ) -> None:
        """Prefill and decode here. Raises Failure."""
        cached_tokens = 0

        def on_step(step: Step) -> None:
            nonlocal cached_tokens
            if answered.first_s is None:
                cached_tokens = step.cached_tokens
                stream.send(wire.Started(cached_tokens))
            answered.heard(step)
            # What to_tokens makes where there are no logprobs, which is the rule.
            stream.send(to_tokens(step) if step.logprobs else wire.Tokens(step.ids))

        submit = Submit(self._worker.sequence(request))
        async with self._worker.engine.request(submit, on_step) as run:
            last = await run.wait_finished()
        _end(request, last, stream, answered, cached_tokens)

    async def fetch(self, ticket: KVTicket) -> None:
        """Collect KV of which more is computed meanwhile, and keep it until cancelled.

        Raises Failure; the `Resume` that follows will find out, and collect it itself.
        """
        peer = self._giver(ticket)
        with self._worker.kv_files.new(ticket.num_bytes) as path:
            fetched = self._fetches[_name(ticket)] = _Fetched(path)
            try:
                fetched.way = await self._transport.collect(ticket, peer, path)
                fetched.done.set()
                await anyio.sleep_forever()
            finally:
                fetched.done.set()
                del self._fetches[_name(ticket)]

    async def _fetched(self, ticket: KVTicket, answered: Answered) -> Path | None:
        """Where KV lies that was collected ahead; None if it was not."""
        fetched = self._fetches.get(_name(ticket))
        if fetched is None:
            return None
        began = anyio.current_time()
        await fetched.done.wait()
        if fetched.way is None:
            return None
        answered.kv_way, answered.kv_bytes = fetched.way, ticket.num_bytes
        answered.kv_s = anyio.current_time() - began  # that was waited for it
        return fetched.path

    async def _collect(self, ticket: KVTicket, peer: Peer, into: Path, answered: Answered) -> None:
        began = anyio.current_time()
        answered.kv_way = await self._transport.collect(ticket, peer, into)
        answered.kv_s = anyio.current_time() - began
        answered.kv_bytes = ticket.num_bytes

    def _fitting(self, ticket: KVTicket, so_far: wire.Generate) -> Peer:
        """Who has the KV, which must be of this request, and of use here. Raises Failure."""
        try:
            peer = self._giver(ticket)
            _check_kv(ticket, so_far, self._worker.engine.must_be_up().layout)
        except Failure as failure:
            self._worker.metrics.refused("collector", failure.code)
            raise
        return peer

    def _giver(self, ticket: KVTicket) -> Peer:
        """The ticket's worker, from our own table."""
        peer = self._worker.peers.get(ticket.worker)
        if peer is None:
            raise Failure(Code.LOST, f"{ticket.worker} is not among this region's workers")
        if peer.url != ticket.url:
            detail = f"{ticket.worker} is at {peer.url}, its ticket says {ticket.url}"
            raise Failure(Code.INCOMPATIBLE, detail)
        return peer


def _name(ticket: KVTicket) -> tuple[str, str, str]:
    return ticket.worker, ticket.epoch, ticket.request_id


def _check_kv(ticket: KVTicket, so_far: wire.Generate, layout: KVLayout) -> None:
    """Failure(INCOMPATIBLE) unless the ticket's KV is of this request, and of our own shape."""
    if ticket.layout.digest != layout.digest:
        detail = f"KV of {shape(ticket.layout)} is no use here, where it is {shape(layout)}"
        raise Failure(Code.INCOMPATIBLE, detail)
    num_known = len(so_far.token_ids) + len(so_far.generated_ids)
    if ticket.num_tokens != num_known - 1:
        detail = f"KV of {ticket.num_tokens} tokens for {num_known} ids, not of {num_known - 1}"
        raise Failure(Code.INCOMPATIBLE, detail)
    if ticket.num_bytes != (num_bytes := layout.exported_bytes(ticket.num_tokens)):
        detail = f"KV of {ticket.num_bytes} bytes for {ticket.num_tokens} tokens, not {num_bytes}"
        raise Failure(Code.INCOMPATIBLE, detail)


def shape(layout: KVLayout) -> str:
    """A layout in words."""
    groups = ", ".join(
        f"{len(group.layers)} {group.kind} layers of {group.num_heads} x {group.head_dim}"
        for group in layout.groups
    )
    rank = f"rank {layout.tp_rank} of {layout.tp_size}"
    return f"{groups}, {layout.dtype}, {rank}, model {layout.model_digest[:12]}"


def _pass_on(stream: Stream[WorkerRequest, WorkerEvent], answered: Answered, step: Step) -> None:
    answered.heard(step)
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
