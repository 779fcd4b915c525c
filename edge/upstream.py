"""Ask regions in order until one answers; when it is lost in mid-answer, go on in the next.

What a token is depends on (seed, index) alone, so a stream that resumes with the ids it has goes on
as if nothing had happened. Knows token ids, no text, and not how regions are ranked.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Protocol, Self

import anyio
import msgspec

from routing import wire
from routing.choose import Choice
from routing.errors import Code, Failure
from routing.link import Call, Link

COME_BACK_S = 5.0  # that a stream which has begun waits for a region, where none is left
LOOK_S = 0.05  # between looks whether one that is reached may be asked again

# What counts against a region. One that refuses is well, or being stopped in good order, and so is
# one whose queue outlasts a request's budget.
_REGION_FAILED = {Code.LOST, Code.UNAVAILABLE, Code.INCOMPATIBLE, Code.INTERNAL}
_SHOWS_NOTHING = {Code.TIMEOUT, Code.ABORTED}
# Nothing was begun. Any other failure may be the request's own doing, and is not had for ever.
REFUSED = {Code.NO_CAPACITY, Code.UNAVAILABLE, Code.DRAINING}
# What the client is told instead of a region's own words, which name addresses and workers.
_SAID = {
    Code.LOST: "the region that was asked cannot be reached, please try again",
    Code.UNAVAILABLE: "the model is not ready to be served, please try again",
    Code.INCOMPATIBLE: "the model is not ready to be served, please try again",
    Code.DRAINING: "the region that was asked is being restarted, please try again",
    Code.STALE_TOKENIZER: "the model is being changed, please try again",
    Code.INTERNAL: "an error in the region that was asked",
}
# Of several refusals the client is told the first of these: it says most about what to do next.
_MOST_TELLING = (
    Code.STALE_TOKENIZER,
    Code.NO_CAPACITY,
    Code.INCOMPATIBLE,
    Code.UNAVAILABLE,
    Code.DRAINING,
    Code.LOST,
)


class Regions(Protocol):
    """Links to regions, and who is told how calls went. `edge.watch.Watch` is one."""

    def now(self) -> float: ...
    def link(self, region: str) -> Link[wire.Event]: ...
    def reached_since(self, region: str, moment: float) -> bool: ...
    async def wait_reached(self, moment: float) -> None: ...
    def called(self, region: str) -> None: ...
    def succeeded(self, region: str) -> None: ...
    def failed(self, region: str) -> None: ...
    def abandoned(self, region: str) -> None: ...
    def draining(self, region: str, model: str) -> None: ...


class Inbox:
    """Events of one call, in order; its reader takes all that have come at once.

    While the reader waits and there is nothing else for it, `tap` may have the tokens instead: it
    says whether it took them. That spares waking a task for each.
    """

    def __init__(self, tap: Callable[[wire.Tokens], bool]) -> None:
        self._tap = tap
        self._events: list[wire.Event | None] = []
        self._arrived = anyio.Event()
        self._idle = False  # the reader waits, and has not been woken

    def put(self, event: wire.Event | None) -> None:
        if self._idle and isinstance(event, wire.Tokens) and self._tap(event):
            return
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        """Have a reader that waits look again."""
        if self._idle:
            self._idle = False
            self._arrived.set()

    async def take(self) -> list[wire.Event | None]:
        """What has come, at least one event, None being the end; empty for a reader woken."""
        if not self._events:
            self._arrived = anyio.Event()
            self._idle = True
            try:
                await self._arrived.wait()
            finally:
                self._idle = False
        events, self._events = self._events, []
        return events


@dataclass(slots=True)
class _Try:
    """One region being asked."""

    choice: Choice
    inbox: Inbox
    call: Call
    spoke: bool = False


@asynccontextmanager
async def generate(
    regions: Regions,
    choose: Callable[[], Sequence[Choice]],
    request: wire.Request,
    *,
    max_tries: int,
) -> AsyncGenerator[Answer, None]:
    """The answer to `request`. `choose` ranks the regions as they are at the time of each try.

    Leaving the block hangs up, wherever the request is.
    """
    answer = Answer(regions, choose, request, max_tries)
    try:
        yield answer
    finally:
        answer.hang_up()


class Answer:
    """Bursts of events: `Started` once, `Tokens`, and `Finish` last, from as many regions as it
    takes; of vectors `Embedded` and nothing else. Raises Failure when no region goes on.

    Tokens that come while the reader of bursts waits for them go to `at_once`, where there is one,
    and are in no burst. It is called where they arrive, so it must not wait.
    """

    def __init__(
        self,
        regions: Regions,
        choose: Callable[[], Sequence[Choice]],
        request: wire.Request,
        max_tries: int,
    ) -> None:
        self.region: str | None = None  # that speaks, or spoke last
        self.regions: list[str] = []  # all that spoke, in order
        self.tries: list[Choice] = []
        self.failures: list[Failure] = []
        self.generated_ids: list[int] = []
        self.at_once: Callable[[wire.Tokens], None] | None = None
        self._regions = regions
        self._choose = choose
        self._request = request
        self._max_tries = max_tries
        self._deadline = anyio.current_time() + request.budget_s
        self._try: _Try | None = None
        self._cached_tokens: int | None = None  # None: nothing has started yet
        self._model_digest: str | None = None  # of what made the first tokens
        self._lost_at = 0.0  # by the region that spoke last, on the event loop's clock
        self._failed_at = -inf  # the last try, on the regions' clock
        self._done = False
        self._woken = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[wire.Event]:
        while not self._done:
            if self._try is None:
                if finish := self._finish_unsaid():
                    self._done = True
                    return [finish]
                await self._begin()
            else:
                events = await self._try.inbox.take()
                burst = self._read(self._try, events)
                if burst or self._woken:
                    self._woken = False
                    return burst
        raise StopAsyncIteration

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first region to start found in its prefix cache."""
        return self._cached_tokens or 0

    @property
    def ended(self) -> bool:
        """Whether the answer came to its own end."""
        return self._done

    def wake(self) -> None:
        """Have the burst that is waited for come now, empty if need be."""
        if self._try is not None:
            self._woken = True
            self._try.inbox.wake()

    def hang_up(self) -> None:
        if self._try is not None:
            self._try.call.cancel()
            if not self._try.spoke:
                self._regions.abandoned(self._try.choice.region)
            self._try = None

    def _hear_at_once(self, tokens: wire.Tokens) -> bool:
        if self.at_once is None or self._try is None or not self._try.spoke:
            return False
        self.generated_ids += tokens.ids
        self.at_once(tokens)
        return True

    def _read(self, asked: _Try, events: list[wire.Event | None]) -> list[wire.Event]:
        """What the client's side needs to know of these events."""
        burst: list[wire.Event] = []
        for event in events:
            match event:
                case wire.Tokens(ids):
                    self._heard(asked)
                    self.generated_ids.extend(ids)
                    burst.append(event)
                case wire.Started(cached_tokens):
                    self._heard(asked)
                    if self._cached_tokens is None:
                        self._cached_tokens = cached_tokens
                        burst.append(event)
                case wire.Finish() | wire.Embedded():
                    self._heard(asked)
                    self._try, self._done = None, True
                    burst.append(self._last(event))
                    break
                case wire.Fault(code, detail, retry_after_s):
                    self._failed(asked, Failure(code, detail, retry_after_s=retry_after_s))
                    break
                case None:
                    self._failed(asked, Failure(Code.LOST, "the stream ended without a last word"))
        return burst

    def _last(self, event: wire.Finish | wire.Embedded) -> wire.Event:
        if isinstance(event, wire.Embedded):
            return event
        return wire.Finish(event.reason, self._usage())

    def _heard(self, asked: _Try) -> None:
        if not asked.spoke:
            asked.spoke = True
            self.region = asked.choice.region
            self.regions.append(self.region)
            self._model_digest = asked.choice.model.model_digest
            self._regions.succeeded(self.region)

    def _failed(self, asked: _Try, failure: Failure) -> None:
        self._try = None
        if asked.spoke:
            self._lost_at = anyio.current_time()
        self._count(asked.choice.region, failure)

    def _count(self, region: str, failure: Failure) -> None:
        """A try came to nothing: the breaker hears of it, and the next try follows if one may."""
        if failure.code in _REGION_FAILED:
            self._regions.failed(region)
        elif failure.code is Code.DRAINING:
            self._regions.draining(region, self._request.model)
        elif failure.code in _SHOWS_NOTHING:
            self._regions.abandoned(region)
        else:
            self._regions.succeeded(region)
        self.failures.append(failure)
        self._failed_at = self._regions.now()

    async def _begin(self) -> None:
        """Ask the next region. Raises Failure when there is none, or none may be asked."""
        if self.failures and not self.failures[-1].code.elsewhere:
            raise _told(self.failures[-1:])
        choice = await self._next_choice()
        if choice is None:
            raise self._most_telling()
        self.tries.append(choice)
        self._regions.called(choice.region)
        inbox = Inbox(self._hear_at_once)
        try:
            call = self._regions.link(choice.region).open_nowait(self._resumed(), inbox.put)
        except Failure as failure:
            self._count(choice.region, failure)
        else:
            self._try = _Try(choice, inbox, call)

    async def _next_choice(self) -> Choice | None:
        """The best region not yet asked; for a stream that has begun, then any that is there."""
        num_lost = sum(failure.code not in REFUSED for failure in self.failures)
        if num_lost >= self._max_tries:
            return None
        asked = {choice.region for choice in self.tries}
        fresh = next((it for it in self._able() if it.region not in asked), None)
        if fresh or not self.generated_ids:
            return fresh
        with anyio.move_on_after(self._lost_at + COME_BACK_S - anyio.current_time()):
            while True:  # there may be thousands of these
                await self._regions.wait_reached(self._failed_at)
                for choice in self._able():
                    if self._regions.reached_since(choice.region, self._failed_at):
                        return choice
                await anyio.sleep(LOOK_S)
        return None

    def _able(self) -> list[Choice]:
        """All that may go on with it, best first: with one model to the end."""
        return [
            choice
            for choice in self._choose()
            if self._model_digest in {None, choice.model.model_digest}
        ]

    def _resumed(self) -> wire.Request:
        """The request as it stands now: with the ids there are, and the time that is left."""
        budget_s = max(0.001, self._deadline - anyio.current_time())
        if isinstance(self._request, wire.Embed):
            return msgspec.structs.replace(self._request, budget_s=budget_s)
        return msgspec.structs.replace(
            self._request, generated_ids=tuple(self.generated_ids), budget_s=budget_s
        )

    def _finish_unsaid(self) -> wire.Finish | None:
        """The end, when a region was lost between its last token and saying so."""
        if isinstance(self._request, wire.Embed):
            return None
        sampling, ids = self._request.sampling, self.generated_ids
        if ids and ids[-1] in sampling.stop_ids:
            return wire.Finish("stop", self._usage())
        if len(ids) >= sampling.max_tokens:
            return wire.Finish("length", self._usage())
        return None

    def _usage(self) -> wire.Usage:
        """Counted here, so that a stream over several regions counts each token once."""
        return wire.Usage(
            prompt_tokens=self._request.num_prompt,
            completion_tokens=len(self.generated_ids),
            cached_tokens=self.cached_tokens,
        )

    def _most_telling(self) -> Failure:
        for code in _MOST_TELLING:
            if alike := [failure for failure in self.failures if failure.code is code]:
                return _told(alike)
        return Failure(Code.UNAVAILABLE, "no region can take the request now")


def _told(alike: Sequence[Failure]) -> Failure:
    """Failures of one code as the one that a client is told, with the soonest retry."""
    waits = [failure.retry_after_s for failure in alike if failure.retry_after_s]
    code, detail = alike[0].code, alike[0].detail
    return Failure(code, _SAID.get(code, detail), retry_after_s=min(waits, default=None))
