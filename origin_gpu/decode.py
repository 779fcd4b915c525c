"""The decode role: collect the KV that another worker computed, then make the rest of the tokens.

It computes no prompt token. Where to collect from is looked up in the table that the front gave,
never read from a ticket.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from infire import reshard
from infire.kv_layout import KVLayout, difference
from infire.notes import Submit
from infire.request import Step
from infire.reshard_files import reshard_files
from origin_gpu.handover import KVTicket, Peer, Prefilled, WorkerEvent, WorkerRequest
from origin_gpu.worker import Answered, Worker, to_tokens, to_usage
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream

MOST_RESHARDING = 2  # threads that copy KV at once: memory is soon the bound


class Transport(Protocol):
    """Gets KV here from where it was computed."""

    async def collect(self, ticket: KVTicket, peer: Peer, *into: Path) -> str:
        """Get its parts as new files at `into`, and let `peer` know that it may forget them.

        Returns which way it went. Raises Failure with a code that lets the request be computed
        elsewhere.
        """

    def being_read(self, *paths: Path) -> AbstractContextManager[None]:
        """A block in which somebody reads what was collected there, even if the files are removed:
        until it has ended well, nothing else is collected into them."""


@dataclass(slots=True)
class _Fetched:
    """KV that is collected ahead of its `Resume`."""

    paths: list[Path]
    way: str | None = None  # that it went; None: it is not here
    done: anyio.Event = field(default_factory=anyio.Event)


class DecodeRole:
    """Goes on from tickets, and does both parts of requests that have none."""

    def __init__(self, worker: Worker, transport: Transport) -> None:
        self._worker = worker
        self._transport = transport
        self._fetches: dict[tuple[str, str, str], _Fetched] = {}
        self._resharding = anyio.CapacityLimiter(MOST_RESHARDING)

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
        layout = self._worker.engine.must_be_up().layout
        peer = self._fitting(ticket, so_far, layout)
        async with self._kv(prefilled, peer, layout, answered) as path:
            submit = Submit(
                self._worker.sequence(so_far),
                str(path),
                ticket.num_tokens,
                piece_ends=prefilled.piece_ends,
            )
            on_step = partial(_pass_on, stream, answered)
            async with self._worker.engine.request(submit, on_step) as run:
                with self._transport.being_read(path):  # by the engine, also if we are cancelled
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
        with ExitStack() as kept:
            files = self._worker.kv_files
            paths = [kept.enter_context(files.new(ticket.part_bytes)) for _ in ticket.parts]
            fetched = self._fetches[_name(ticket)] = _Fetched(paths)
            try:
                fetched.way = await self._transport.collect(ticket, peer, *paths)
                fetched.done.set()
                await anyio.sleep_forever()
            finally:
                fetched.done.set()
                del self._fetches[_name(ticket)]

    @asynccontextmanager
    async def _kv(
        self, prefilled: Prefilled, peer: Peer, layout: KVLayout, answered: Answered
    ) -> AsyncGenerator[Path, None]:
        """The ticket's KV in a file, cut as this engine has it. Raises Failure."""
        files, began = self._worker.kv_files, anyio.current_time()
        ticket = prefilled.ticket
        assert ticket is not None
        num_bytes = layout.exported_bytes(ticket.num_tokens)
        with ExitStack() as collected, files.new(num_bytes) as path:
            into = [path]
            as_it_is = reshard.as_it_is(ticket.layout, layout, ticket.parts)
            if fetched := await self._fetched(ticket):
                answered.kv_way, into = fetched
            else:
                if not as_it_is:
                    parts = [files.new(ticket.part_bytes) for _ in ticket.parts]
                    into = [collected.enter_context(part) for part in parts]
                answered.kv_way = await self._transport.collect(ticket, peer, *into)
            if not as_it_is:
                await self._reshard(prefilled, ticket, into, layout, path)
                collected.close()
            answered.kv_s = anyio.current_time() - began
            answered.kv_bytes = ticket.num_bytes
            yield into[0] if as_it_is else path

    async def _fetched(self, ticket: KVTicket) -> tuple[str, list[Path]] | None:
        """KV that was collected ahead, and the way it went; None if it was not."""
        fetched = self._fetches.get(_name(ticket))
        if fetched is None:
            return None
        await fetched.done.wait()
        return None if fetched.way is None else (fetched.way, fetched.paths)

    async def _reshard(
        self,
        prefilled: Prefilled,
        ticket: KVTicket,
        parts: list[Path],
        layout: KVLayout,
        into: Path,
    ) -> None:
        """Make of what other ranks have had what ours has."""
        ends = prefilled.piece_ends or (ticket.num_tokens,)
        strips = reshard.plan_pieces(ticket.layout, layout, ends, ticket.parts)
        sources = dict(zip(ticket.parts, parts, strict=True))
        num_bytes = layout.exported_bytes(ticket.num_tokens)
        try:
            with self._transport.being_read(*parts):
                await anyio.to_thread.run_sync(
                    reshard_files, strips, sources, into, num_bytes, limiter=self._resharding
                )
        except (OSError, ValueError) as exc:
            detail = f"KV of {ticket.request_id} cannot be cut anew: {exc}"
            raise Failure(Code.LOST, detail) from exc

    def _fitting(self, ticket: KVTicket, so_far: wire.Generate, layout: KVLayout) -> Peer:
        """Who has the KV, which must be of this request, and of use here. Raises Failure."""
        try:
            peer = self._giver(ticket)
            _check_kv(ticket, so_far, layout)
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
    """Failure(INCOMPATIBLE) unless the ticket's KV is of this request, and of use to this layout.

    That of other ranks is, if it is all there; that of blocks of another size always.
    """
    if found := difference(ticket.layout, layout):
        raise Failure(Code.INCOMPATIBLE, f"KV that does not fit: {found}")
    try:
        reshard.plan(ticket.layout, layout, ticket.num_tokens, ticket.parts)
    except ValueError as exc:
        raise Failure(Code.INCOMPATIBLE, f"KV that is not whole: {exc}") from exc
    num_known = len(so_far.token_ids) + len(so_far.generated_ids)
    if ticket.num_tokens != num_known - 1:
        detail = f"KV of {ticket.num_tokens} tokens for {num_known} ids, not of {num_known - 1}"
        raise Failure(Code.INCOMPATIBLE, detail)
    num_bytes = len(ticket.parts) * ticket.layout.exported_bytes(ticket.num_tokens)
    if ticket.num_bytes != num_bytes:
        detail = f"KV of {ticket.num_bytes} bytes for {ticket.num_tokens} tokens, not {num_bytes}"
        raise Failure(Code.INCOMPATIBLE, detail)


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
