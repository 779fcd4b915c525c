"""Choose workers for a request: those with the fewest tokens in flight. No I/O, no clock, no state.

A request is either split, prefill on one worker and decode on another, or stays whole on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from origin_gpu.settings import WorkerRole
from routing import wire
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
    tokens_in_flight: int


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


def place(ready: Sequence[Candidate], request: wire.Generate) -> Placement:
    """Where `request` goes. Failure: UNAVAILABLE, STALE_TOKENIZER, INCOMPATIBLE or NO_CAPACITY."""
    serving = _serving(ready, request)
    if not options(serving):
        raise _no_way(serving, request.model)
    best = min(options([it for it in serving if it.room > 0]), key=_load, default=None)
    if best is None:
        raise _full(request.model)
    if len(best) == 1:
        return Whole(best[0].name)
    return Split(best[0].name, best[1].name)


def place_whole(ready: Sequence[Candidate], request: wire.Generate) -> Whole:
    """Where `request` is computed anew, its output so far included, after its worker was lost.

    Any role can. Those that decode anyway go first: a prefill worker is slowed down by a decode.
    """
    serving = _serving(ready, request)
    able = [it for it in serving if it.room > 0]
    if not able:
        raise _full(request.model)
    best = min(able, key=lambda it: (it.role == "prefill", it.tokens_in_flight, it.name))
    return Whole(best.name)


def options(serving: Sequence[Candidate]) -> list[tuple[Candidate, ...]]:
    """The ways to serve: (worker,) alone, or (prefill, decode). The best pair stands for all."""
    alone: list[tuple[Candidate, ...]] = [(it,) for it in serving if it.role == "both"]
    decodes: dict[str, Candidate] = {}  # layout: the one with the fewest tokens
    for it in sorted(serving, key=_tokens):
        if it.role == "decode":
            decodes.setdefault(it.layout_digest, it)
    prefills = [it for it in serving if it.role == "prefill" and it.layout_digest in decodes]
    if not prefills:
        return alone
    prefill = min(prefills, key=_tokens)
    return [*alone, (prefill, decodes[prefill.layout_digest])]


def _tokens(it: Candidate) -> tuple[int, str]:
    return it.tokens_in_flight, it.name


def _load(option: tuple[Candidate, ...]) -> tuple[int, str]:
    """What the busiest worker of a way has to do."""
    return max(it.tokens_in_flight for it in option), option[0].name


def _serving(ready: Sequence[Candidate], request: wire.Generate) -> list[Candidate]:
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


def _no_way(serving: Sequence[Candidate], model: str) -> Failure:
    roles = {it.role for it in serving}
    if roles == {"prefill", "decode"}:
        detail = f"no prefill worker of {model} has a decode worker with the same KV layout"
        return Failure(Code.INCOMPATIBLE, detail)
    (role,) = roles
    missing = "decode" if role == "prefill" else "prefill"
    return Failure(Code.UNAVAILABLE, f"no {missing} worker here is ready to serve {model}")


def _full(model: str) -> Failure:
    detail = f"no room for {model}: the queues here are full"
    return Failure(Code.NO_CAPACITY, detail, retry_after_s=RETRY_AFTER_S)
