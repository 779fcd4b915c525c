"""Choose workers for a request: those that will have done it soonest. No I/O, no clock, no state.

Work is counted in tokens: those in flight at a worker, and of the prompt what its prefix cache is
not expected to have. So a worker that has a hot prefix gets the requests that begin with it until
its queue is longer than what they would save there; then others compute it too, and have it.

A request is split, prefill on one worker and decode on another, or stays whole on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from origin_gpu.settings import WorkerRole
from routing import wire
from routing.affinity import by_rendezvous
from routing.errors import Code, Failure
from routing.region import ModelReport

RETRY_AFTER_S = 1.0  # a queue of a region moves within a few steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that is ready, as it is when a request comes."""

    name: str
    role: WorkerRole
    models: tuple[ModelReport, ...]
    layout_digest: str  # KV passes only between workers that have the same
    room: int  # requests it would still take
    idle: int = 1  # of which so many would begin at once
    tokens_in_flight: int
    cached_tokens: int = 0  # of this request, as far as is known: it may be less, and takes longer


@dataclass(frozen=True, slots=True)
class Split:
    """Prefill on one worker, decode on another."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Whole:
    """Prefill and decode on the same worker; no KV passes."""

    worker: str


Placement = Split | Whole


def place(
    ready: Sequence[Candidate],
    request: wire.Generate,
    *,
    local_tokens: int = 0,
    lone: bool = True,
) -> Placement:
    """Where `request` goes. Failure: UNAVAILABLE, STALE_TOKENIZER, INCOMPATIBLE or NO_CAPACITY.

    A decode worker computes up to `local_tokens` of a prompt itself: to hand over takes longer.
    Without `lone`, the workers of one role do not do both where those of the other are missing.
    """
    serving = _serving(ready, request)
    lone = lone and _lone(serving)
    if not _ways(serving, lone=lone):
        detail = "no prefill worker of {} has a decode worker with the same KV layout"
        raise Failure(Code.INCOMPATIBLE, detail.format(request.model))
    able = [it for it in serving if it.room > 0 and (it.idle > 0 or not request.never_waits)]
    order = _Order(request, able)
    ways = _ways(able, order, lone=lone)
    if not ways:
        raise _full(request.model)
    best = min(ways, key=order.load)
    if len(best) == 1:
        return Whole(best[0].name)
    if local := _local(able, order, local_tokens):
        return Whole(local.name)
    return Split(best[0].name, best[1].name)


def place_whole(ready: Sequence[Candidate], request: wire.Generate) -> Whole:
    """Where `request` is computed anew, its output so far included, after its worker was lost.

    Any role can. Those that decode anyway go first: a prefill worker is slowed down by a decode.
    """
    serving = _serving(ready, request)
    able = [it for it in serving if it.room > 0]
    if not able:
        raise _full(request.model)
    order = _Order(request, able)
    best = min(able, key=lambda it: (it.role == "prefill", *order.prefill(it)))
    return Whole(best.name)


def place_embed(ready: Sequence[Candidate], request: wire.Embed) -> str:
    """The worker that makes the vectors of `request`: the one with the fewest tokens to read.

    Failure: UNAVAILABLE, STALE_TOKENIZER or NO_CAPACITY.
    """
    serving = _serving(ready, request)
    able = [it for it in serving if it.room > 0 and (it.idle > 0 or not request.never_waits)]
    if not able:
        raise _full(request.model)
    return min(able, key=lambda it: (it.tokens_in_flight, it.name)).name


class _Order:
    """Who goes first in what, for one request. Of those that are equal, the one that all requests
    of its session or prefix would get, however little is known of caches."""

    def __init__(self, request: wire.Generate, able: Iterable[Candidate]) -> None:
        names = sorted(it.name for it in able)
        if request.affinity:
            names = by_rendezvous(request.affinity, names)
        self._rank = {name: n for n, name in enumerate(names)}
        self._context = len(request.token_ids) + len(request.generated_ids)

    def missing(self, it: Candidate) -> int:
        """Tokens that `it` would have to compute before the next."""
        return max(1, self._context - it.cached_tokens)

    def prefill(self, it: Candidate) -> tuple[int, int]:
        return it.tokens_in_flight + self.missing(it), self._rank[it.name]

    def decode(self, it: Candidate) -> tuple[int, int, int]:
        return it.tokens_in_flight, self.missing(it), self._rank[it.name]

    def load(self, way: tuple[Candidate, ...]) -> tuple[int, int]:
        """What the busiest worker of a way has to do, and what is to be computed."""
        first = way[0]
        busiest = max(it.tokens_in_flight for it in way)
        return busiest + self.missing(first), self._rank[first.name]

    def near(self, it: Candidate, others: Iterable[Candidate]) -> bool:
        """Whether `it` is busier than any of the others by no more than the request itself."""
        return it.tokens_in_flight <= self._context + min(o.tokens_in_flight for o in others)


def _local(able: Sequence[Candidate], order: _Order, local_tokens: int) -> Candidate | None:
    """The decode worker that has so little to compute that it prefills as well."""
    decodes = [it for it in able if it.role == "decode"]
    short = [it for it in decodes if order.missing(it) <= local_tokens]
    best = min(short, key=order.prefill, default=None)
    return best if best and order.near(best, decodes) else None


def options(serving: Sequence[Candidate]) -> list[tuple[Candidate, ...]]:
    """The ways to serve: (worker,) alone, or (prefill, decode). One pair stands for all.

    Where a role is missing altogether, those of the other do both: slower, and better than nothing.
    """
    return _ways(serving, lone=_lone(serving))


def _lone(serving: Sequence[Candidate]) -> bool:
    return len({it.role for it in serving}) == 1


def _ways(
    able: Sequence[Candidate], order: _Order | None = None, *, lone: bool
) -> list[tuple[Candidate, ...]]:
    """As `options`, of pairs the best one. With `lone`, each is a way."""
    if lone:
        return [(it,) for it in able]
    by_prefill: Callable[[Candidate], tuple[int, ...]] = order.prefill if order else _any
    by_decode: Callable[[Candidate], tuple[int, ...]] = order.decode if order else _any
    ways: list[tuple[Candidate, ...]] = [(it,) for it in able if it.role == "both"]
    decodes: dict[str, Candidate] = {}  # layout: the first of them
    for it in sorted(able, key=by_decode):
        if it.role == "decode":
            decodes.setdefault(it.layout_digest, it)
    prefills = [it for it in able if it.role == "prefill" and it.layout_digest in decodes]
    if prefills:
        prefill = min(prefills, key=by_prefill)
        ways.append((prefill, decodes[prefill.layout_digest]))
    return ways


def _any(_: Candidate) -> tuple[int, ...]:
    return ()


def _serving(ready: Sequence[Candidate], request: wire.Request) -> list[Candidate]:
    """Those that have the request's model, with the tokenizer that made its ids."""
    by_model = [
        (it, report.tokenizer_digest)
        for it in ready
        for report in it.models
        if report.model == request.model
    ]
    if not by_model:
        raise Failure(Code.UNAVAILABLE, f"no worker here is ready to serve {request.model}")
    serving = [it for it, digest in by_model if digest == request.tokenizer_digest]
    if not serving:
        raise Failure(
            Code.STALE_TOKENIZER,
            f"{request.model} is served here with tokenizer {by_model[0][1][:12]}, "
            f"not {request.tokenizer_digest[:12]}",
        )
    return serving


def _full(model: str) -> Failure:
    detail = f"no room for {model}: the queues here are full"
    return Failure(Code.NO_CAPACITY, detail, retry_after_s=RETRY_AFTER_S)
