"""Order regions for one request. A pure function of what is known now: no clock, no calls.

The nearest region that is well and has room goes first. Distance counts where the client's place is
known, measured round trips where it is not. An affinity key chooses among regions that are about
equally near, so that a session finds its prefix cache without travelling for it; when its region is
full, the next of the same key takes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from routing.affinity import by_rendezvous
from routing.errors import Code, Failure
from routing.geo import distance_km
from routing.health import Breaker
from routing.region import ModelReport, Place, Region, RegionReport, Task

STALE_S = 5.0  # five reports missed: what it says of its room is history
LOADING_RETRY_S = 5.0  # that a client is told while a model is loaded: it may take minutes
NEAR_KM = 300.0  # about 3 ms of light in fibre, there and back: no client feels the difference
NEAR_MS = 5.0  # the same, where only round trips are known


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What an edge knows of one region."""

    region: Region
    report: RegionReport | None = None  # the last one, however old
    reported_at: float = -inf  # on the edge's clock
    rtt_ms: float | None = None
    connected: bool = False  # its link is up
    breaker: Breaker = field(default_factory=Breaker)
    served: frozenset[str] = frozenset()  # models that any of its reports named

    def model(self, name: str) -> ModelReport | None:
        models = self.report.models if self.report else ()
        return next((model for model in models if model.model == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one request needs of a region."""

    model: str
    num_tokens: int = 0  # prompt and output together
    tokenizer_digest: str | None = None  # what the ids were made with; None: not made yet
    place: Place | None = None  # the client's
    affinity: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A region to ask, and why it stands where it does."""

    region: str
    model: ModelReport
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    known: Known
    model: ModelReport
    tier: int  # 0: ready; 1: full, may still say no cheaply; 2: in doubt
    cost: float  # km or ms
    reasons: tuple[str, ...]


def rank(regions: Iterable[Known], wanted: Wanted, now: float) -> list[Choice]:
    """Regions to try, best first. Those that cannot serve the request are left out."""
    scored = [_score(known, model, wanted, now) for known, model in _able(regions, wanted, now)]
    scored.sort(key=lambda s: (s.tier, s.cost, -_room(s.known, s.model), s.known.region.name))
    if wanted.affinity is not None:
        scored = _prefer(wanted.affinity, scored, NEAR_MS if wanted.place is None else NEAR_KM)
    return [Choice(region=s.known.region.name, model=s.model, reasons=s.reasons) for s in scored]


def context_window(regions: Iterable[Known], model: str) -> int | None:
    """Tokens that a request for `model` may have where it may have most; None: nobody serves it."""
    serving = (known.model(model) for known in regions)
    return max((report.max_sequence_tokens for report in serving if report), default=None)


def task(regions: Iterable[Known], model: str) -> Task | None:
    """What `model` does, where a region serves it; None: nobody does."""
    serving = (known.model(model) for known in regions)
    return next((report.task for report in serving if report), None)


def is_loading(regions: Iterable[Known], model: str) -> bool:
    """Whether `model` will be served by a region that is getting ready."""
    return any(known.report and model in known.report.loading for known in regions)


def refusal(regions: Sequence[Known], model: str, now: float) -> Failure:
    """Why `rank` came back empty, for the client."""
    serving = [known for known in regions if known.model(model)]
    if not any(known.report for known in regions):
        return Failure(Code.UNAVAILABLE, "no region has been reached yet", retry_after_s=1.0)
    if not serving and is_loading(regions, model):
        detail = f"{model} is being loaded"
        return Failure(Code.UNAVAILABLE, detail, retry_after_s=LOADING_RETRY_S)
    if not serving and any(model in known.served for known in regions):
        detail = f"no region serves {model} at the moment"
        return Failure(Code.UNAVAILABLE, detail, retry_after_s=1.0)
    if not serving:
        return Failure(Code.UNKNOWN_MODEL, f"No such model {model} or task")
    wait_s = min(known.breaker.wait_s(now) for known in serving)
    detail = f"none of the {len(serving)} regions that serve {model} can be reached"
    return Failure(Code.UNAVAILABLE, detail, retry_after_s=max(1.0, wait_s))


def _able(
    regions: Iterable[Known], wanted: Wanted, now: float
) -> Iterable[tuple[Known, ModelReport]]:
    for known in regions:
        model = known.model(wanted.model)
        if (
            model is not None
            and model.max_sequence_tokens >= wanted.num_tokens
            and wanted.tokenizer_digest in {None, model.tokenizer_digest}
            and known.breaker.admits(now)
        ):
            yield known, model


def _score(known: Known, model: ModelReport, wanted: Wanted, now: float) -> _Scored:
    age_s = now - known.reported_at
    room = _room(known, model)
    if not known.connected:
        tier, state = 2, "not connected"
    elif age_s > STALE_S:
        tier, state = 2, f"report {age_s:.1f} s old"
    else:
        tier, state = (0, f"room {room}") if room > 0 else (1, "no room")
    cost, far = _cost(known, wanted)
    return _Scored(known=known, model=model, tier=tier, cost=cost, reasons=(far, state))


def _cost(known: Known, wanted: Wanted) -> tuple[float, str]:
    if wanted.place is not None:
        km = distance_km(wanted.place, known.region.place)
        return km, f"{km:.0f} km"
    if known.rtt_ms is not None:
        return known.rtt_ms, f"rtt {known.rtt_ms:.1f} ms"
    return inf, "rtt unknown"


def _room(known: Known, model: ModelReport) -> int:
    if model.room is not None:
        return model.room
    return known.report.room if known.report else 0


def _prefer(key: bytes, scored: list[_Scored], near: float) -> list[_Scored]:
    """The ready regions about as near as the nearest, in the key's order; then the others."""
    ready = {
        s.known.region.name: s for s in scored if s.tier == 0 and s.cost <= scored[0].cost + near
    }
    first = [
        replace(ready[name], reasons=(*ready[name].reasons, f"affinity {place} of {len(ready)}"))
        for place, name in enumerate(by_rendezvous(key, ready), start=1)
    ]
    return first + [s for s in scored if s.known.region.name not in ready]
