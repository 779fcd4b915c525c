"""One request on its way through a region: placed, prefilled, handed over, relayed.

Tokens are relayed where they arrive, with no task in between; one waits for the stages only.
When a worker is lost, or refuses, the request is computed anew on another, once. One that is being
stopped takes nothing new, but what it has begun; being refused by it costs no try.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Literal

import anyio
import msgspec

from origin_gpu.handover import Computing, Fetch, KVTicket, Prefill, Prefilled, Resume, WorkerEvent
from origin_gpu.place import Candidate, Placement, Split, Whole, place, place_whole
from origin_gpu.pool import Pool
from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream
from routing.logs import log

logger = logging.getLogger(__name__)

# split: prefill and decode on two workers; local: both on one that only decodes, or only prefills
Way = Literal["split", "whole", "local"]

EXPECTED_OUTPUT = 256  # tokens: what a request is taken to decode when it may decode more


@dataclass(slots=True)
class _End:
    """What became of a stream that is relayed."""

    come: anyio.Event = field(default_factory=anyio.Event)
    fault: wire.Fault | None = None


class Passage:
    """Carries one request, and knows how far it has come."""

    def __init__(
        self,
        pool: Pool,
        stream: Stream[wire.Generate, wire.Event],
        *,
        local_tokens: int = 0,
        on_first: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_first` is called when the first token made here is there."""
        self.request = stream.request
        self.ids = list(self.request.generated_ids)  # the output so far
        self.cached_tokens = 0
        self.expected_cached_tokens = 0  # by the worker that was asked first to compute the prompt
        self.ttft_s: float | None = None
        self.reason: wire.Reason | None = None  # why it ended, once it has ended well
        self.prefill_worker: str | None = None  # that was asked last
        self.decode_worker: str | None = None
        self.second_try: Failure | None = None  # what made one necessary
        self.way: Way | None = None  # in which it was placed first
        self._local_tokens = local_tokens
        self._on_first = on_first
        self._known: dict[str, int] = {}  # worker: tokens of the request that it should have
        self._pool = pool
        self._stream = stream
        self._began = monotonic()
        self._started = False
        self._fetching = False  # its KV is collected as it is computed
        self._asked = ""  # the worker that any failure now is due to

    @property
    def num_new(self) -> int:
        """Tokens made here."""
        return len(self.ids) - len(self.request.generated_ids)

    @property
    def told(self) -> dict[str, object]:
        """What a log line says of it, besides what it says of any request."""
        return {
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
            "output_tokens": self.num_new,
            "ttft_ms": None if self.ttft_s is None else round(1000 * self.ttft_s, 1),
        }

    async def carry(self) -> None:
        """Return when the request has ended well. Failure: what its client is to be told."""
        budget_s = self.request.budget_s
        try:
            with anyio.fail_after(budget_s):
                await self._carry()
        except TimeoutError:
            detail = f"{len(self.ids)} tokens after {budget_s:g} s, when the time was up"
            raise Failure(Code.TIMEOUT, detail) from None

    async def _carry(self) -> None:
        ready = self._ready()
        placement = place(ready, self.request, local_tokens=self._local_tokens)
        self._note(placement, ready)
        try:
            await self._go(placement)
        except Failure as failure:
            if not failure.code.elsewhere or failure.code is Code.DRAINING:  # so are all others
                raise
            await self._go_again(failure)

    async def _go(self, placement: Placement) -> None:
        """As placed, or elsewhere where a worker is being stopped: that costs no try."""
        while True:
            try:
                return await self._go_once(placement)
            except Failure as failure:
                if failure.code is not Code.DRAINING:
                    raise
                self._pool.leave_out(self._asked)
                placement = self._other_placement(failure)

    async def _go_once(self, placement: Placement) -> None:
        match placement:
            case Whole(worker):
                # its prompt and its output, whatever of it is cached: that is read at every token
                with self._pool.charge(worker, self._context + self._expected):
                    await self._relay(worker, self._so_far())
            case Split(prefill, decode):
                await self._go_split(prefill, decode)

    async def _go_split(self, prefill: str, decode: str) -> None:
        layout = self._pool.layout(decode)
        self._fetching = False
        with ExitStack() as held:
            charge = held.enter_context(self._pool.charge(decode, self._context + self._expected))
            request = self._so_far()
            fetch = partial(self._fetch, decode, held)
            prefilled = await self._prefill(prefill, request, held, fetch)
            self._start(prefilled.cached_tokens)
            self._pass_on(prefilled.first)
            if prefilled.finish is not None:
                self._finish(prefilled.finish.reason)
            else:
                taker = decode  # to which the KV may be on its way already
                if not self._fetching:
                    taker = _taker(self._pool.candidates(), layout, decode)
                if taker != decode:
                    charge.end()
                    held.enter_context(self._pool.charge(taker, self._context + self._expected))
                await self._relay(taker, Resume(request, prefilled))

    async def _go_again(self, failure: Failure) -> None:
        """One more try, on another worker; `failure` stands if none can."""
        if reason := self._over():
            self._finish(reason)
            return
        placement = self._other_placement(failure)
        self.second_try = failure
        log(
            logger,
            "second try",
            request_id=self.request.request_id,
            lost=self._asked,
            code=failure.code,
            detail=failure.detail,
            output_tokens=len(self.ids),
        )
        await self._go(placement)

    def _other_placement(self, failure: Failure) -> Placement:
        """Without the worker that failed, if possible. Raises `failure` if there is none.

        A decode worker that could not collect is well itself, and may be all that is left.
        """
        others = self._ready(excluding={self._asked})
        try:
            if len(self.ids) == len(self.request.generated_ids):
                # What prefill workers have no room for is not for decode workers to do.
                lone = failure.code is not Code.NO_CAPACITY
                return place(others, self.request, local_tokens=self._local_tokens, lone=lone)
            return place_whole(others or self._ready(), self._so_far())
        except Failure:
            raise failure from None

    def _ready(self, *, excluding: AbstractSet[str] = frozenset()) -> list[Candidate]:
        ready = self._pool.candidates(self._so_far(), excluding=excluding)
        self._known = {it.name: it.cached_tokens for it in ready}
        return ready

    def _note(self, placement: Placement, ready: Sequence[Candidate]) -> None:
        match placement:
            case Split(prefill, _):
                self.way, first = "split", prefill
            case Whole(worker):
                roles = {it.role for it in ready if it.name == worker}
                self.way, first = "whole" if "both" in roles else "local", worker
        self.expected_cached_tokens = self._known[first]

    def _fetch(self, worker: str, held: ExitStack, ticket: KVTicket) -> None:
        """Have KV collected as it is computed. If that comes to nothing, it is collected later."""
        with suppress(Failure):
            held.callback(self._pool.open(worker, Fetch(ticket), lambda event: None).cancel)
            self._fetching = True

    async def _prefill(
        self,
        worker: str,
        request: wire.Generate,
        held: ExitStack,
        fetch: Callable[[KVTicket], None],
    ) -> Prefilled:
        """The worker's answer; from then on `held` keeps the KV there until it is collected.

        What was decoded to its end was collected: that the worker hears from the collector, maybe
        after it would hear us hang up.
        """
        answers: list[WorkerEvent] = []
        answered = anyio.Event()

        def hear(event: WorkerEvent | None) -> None:
            if isinstance(event, Computing):
                fetch(event.ticket)
                return
            if event is not None:
                answers.append(event)
            answered.set()

        self._asked = self.prefill_worker = worker
        with self._pool.charge(worker, max(1, self._context - self._known.get(worker, 0))):
            call = self._pool.open(worker, Prefill(request), hear)
            held.push(lambda failed, *_: call.cancel() if failed else None)
            await answered.wait()
        match answers:
            case [Prefilled() as prefilled, *_]:
                return prefilled
            case [wire.Fault() as fault, *_]:
                raise _failure(fault)
            case _:
                raise Failure(Code.LOST, f"{worker} ended a prefill without an answer")

    async def _relay(self, worker: str, request: wire.Generate | Resume) -> None:
        """Pass on what `worker` answers, to its end."""
        end = _End()
        self._asked = self.decode_worker = worker
        if not isinstance(request, Resume):
            self.prefill_worker = worker
        call = self._pool.open(worker, request, partial(self._hear, end))
        try:
            await end.come.wait()
        finally:
            call.cancel()
        if end.fault is not None:
            raise _failure(end.fault)
        if self.reason is None:
            raise Failure(Code.LOST, f"{worker} ended a request without a finish")

    def _hear(self, end: _End, event: WorkerEvent | None) -> None:
        match event:
            case wire.Tokens() if self.ttft_s is not None:  # as `_pass_on`, once a token
                self.ids += event.ids
                self._stream.send(event)
            case wire.Tokens():
                self._pass_on(event)
            case wire.Started():
                self._start(event.cached_tokens)
            case wire.Finish():
                self._finish(event.reason)
            case wire.Fault():
                end.fault = event
            case None:
                end.come.set()

    def _start(self, cached_tokens: int) -> None:
        if not self._started:  # a second try starts again, its client does not
            self._started = True
            self.cached_tokens = cached_tokens
            self._stream.send(wire.Started(cached_tokens))

    def _pass_on(self, tokens: wire.Tokens) -> None:
        if self.ttft_s is None:
            self.ttft_s = monotonic() - self._began
            self._on_first()
        self.ids += tokens.ids
        self._stream.send(tokens)

    def _finish(self, reason: wire.Reason) -> None:
        """The only place that counts: what a worker counts ends with its own part."""
        self.reason = reason
        usage = wire.Usage(
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=len(self.ids),
            cached_tokens=self.cached_tokens,
        )
        self._stream.send(wire.Finish(reason, usage))

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._began

    @property
    def _context(self) -> int:
        return len(self.request.token_ids) + len(self.ids)

    @property
    def _expected(self) -> int:
        return min(EXPECTED_OUTPUT, max(0, self.request.sampling.max_tokens - len(self.ids)))

    def _so_far(self) -> wire.Generate:
        """The request as the next worker gets it: with the output so far, and the time left."""
        return msgspec.structs.replace(
            self.request,
            generated_ids=tuple(self.ids),
            budget_s=max(0.0, self.request.budget_s - self.elapsed_s),
        )

    def _over(self) -> wire.Reason | None:
        """Why the output is complete already, its worker having died before it could say so."""
        sampling = self.request.sampling
        if self.ids and self.ids[-1] in sampling.stop_ids:
            return "stop"
        return "length" if len(self.ids) >= sampling.max_tokens else None


def _taker(ready: Sequence[Candidate], layout: str, decode: str) -> str:
    """Who takes the KV over: another with the same layout, where `decode` is not ready by now."""
    able = [it for it in ready if it.role == "decode" and it.layout_digest == layout]
    if not able or any(it.name == decode for it in able):
        return decode
    return min(able, key=lambda it: (it.tokens_in_flight, it.name)).name


def _failure(fault: wire.Fault) -> Failure:
    return Failure(fault.code, fault.detail, retry_after_s=fault.retry_after_s)
