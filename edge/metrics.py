"""What an edge counts, and how it is told: Prometheus metrics, and one log line a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.auth import Tenant
from edge.complete import Tries
from edge.limits import Rule, Standing
from edge.upstream import REFUSED
from edge.watch import Watch
from routing.health import State
from routing.logs import log

logger = logging.getLogger("edge.request")

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOTAL_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True, kw_only=True)
class Record:
    """One request, filled in on its way and told at its end."""

    request_id: str
    started: float  # monotonic seconds
    route: str = "none"
    account: str | None = None
    tenant: Tenant | None = None  # once its key was checked
    model: str | None = None  # as asked for
    served_model: str | None = None  # the same once it is known to be served: a bounded label
    stream: bool = False
    region: str | None = None  # that spoke first, as the client was told
    tries: Tries = field(default_factory=Tries)
    num_output: int | None = None  # as the client was told; None: it was not
    first_at: float | None = None  # monotonic seconds: the first piece of the answer
    outcome: str = "ok"  # or a failure's label, or how the client left
    detail: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # of the response, besides
    counted: dict[Rule, float] = field(default_factory=dict)  # by which limits, and when: Unix s
    is_inside: bool = False  # asked by the edge itself, again until there is room
    standings: tuple[Standing, ...] = ()  # of limits that were looked at, as they were then
    on_first: Callable[[], None] = lambda: None  # called at the first piece of the answer
    further: list[Record] = field(default_factory=list)  # choices after the first
    counts_prompt: bool = True  # False: a choice whose prompt another one counts
    status: int = 0  # HTTP, once it is out
    cached: bool = False  # told again, and asked of no region
    logged: bool = False  # whether it has a row in the request logs
    metadata: dict[str, str | float | bool] = field(default_factory=dict)  # its sender's own
    bodies: tuple[bytes, bytearray] | None = None  # request and answer, where both are to be kept

    @property
    def num_prompt(self) -> int:
        """What its prompt counts for: nothing where every region refused to begin with it."""
        is_refused = self.outcome in REFUSED and not self.tries.regions
        return self.tries.num_prompt if self.counts_prompt and not is_refused else 0

    def note_piece(self, region: str, now: float) -> None:
        """A piece of the answer came, the first if there was none."""
        if self.first_at is None:
            self.first_at, self.region = now, region
            self.on_first()

    def begin_anew(self, headers: list[tuple[bytes, bytes]]) -> None:
        """What came before was not told: another try begins."""
        self.headers = headers
        self.first_at = self.region = None
        self.further.clear()


class Behind(Protocol):
    """What writes rows of usage. `edge.ledger.Ledger` is one."""

    @property
    def num_pending(self) -> int: ...
    @property
    def num_lost(self) -> int: ...


class Keeping(Protocol):
    """What the store and what stands on it count. `edge.stored.Stored` is one."""

    @property
    def store_calls(self) -> Mapping[str, int]: ...
    @property
    def store_busy_s(self) -> float: ...
    @property
    def job_requests(self) -> Mapping[tuple[str, str], int]: ...
    @property
    def webhook_calls(self) -> Mapping[str, int]: ...


class Metrics:
    def __init__(self, watch: Watch, ledger: Behind | None = None) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "edgefire_edge_requests",
            "Requests ended, by outcome: ok, a failure's label, hung_up or stalled.",
            ["route", "model", "outcome"],
            registry=self._registry,
        )
        self._served = Counter(
            "edgefire_edge_served",
            "Answers begun, by the region that made the first token.",
            ["region"],
            registry=self._registry,
        )
        self._tries = Counter(
            "edgefire_edge_failed_tries",
            "Tries of a region that came to nothing, by why.",
            ["outcome"],
            registry=self._registry,
        )
        self._cached = Counter(
            "edgefire_edge_cached",
            "Answers told again, from the cache or by their idempotency key.",
            ["route"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "edgefire_edge_tokens",
            "Tokens of requests that reached a region.",
            ["model", "kind"],
            registry=self._registry,
        )
        self._ttft = Histogram(
            "edgefire_edge_ttft_seconds",
            "From a request's arrival to the first piece of its answer.",
            ["model"],
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._total = Histogram(
            "edgefire_edge_request_seconds",
            "From a request's arrival to its end.",
            ["model"],
            buckets=_TOTAL_BUCKETS_S,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "edgefire_edge_in_flight",
            "Requests arrived and not ended.",
            registry=self._registry,
        )
        self._registry.register(_Regions(watch))
        if ledger is not None:
            self._registry.register(_Ledger(ledger))
        self.num_in_flight = 0

    def keep(self, kept: Keeping) -> None:
        """Tell what it counts, too."""
        self._registry.register(_Kept(kept))

    def began(self) -> None:
        self.num_in_flight += 1
        self._in_flight.set(self.num_in_flight)

    def ended(self, record: Record, now: float) -> None:
        """Count the request and write its line."""
        self.num_in_flight -= 1
        self._in_flight.set(self.num_in_flight)
        model = record.served_model or ""
        self._requests.labels(record.route, model, record.outcome).inc()
        if record.cached:
            self._cached.labels(record.route).inc()
        for failure in record.tries.failures:
            self._tries.labels(failure.code.value).inc()
        if record.region:
            self._served.labels(record.region).inc()
        for each in (record, *record.further):
            self._count_tokens(each, model)
        if record.tries.answers:
            self._total.labels(model).observe(now - record.started)
        if record.first_at is not None:
            self._ttft.labels(model).observe(record.first_at - record.started)
        _tell(record, now)

    def _count_tokens(self, record: Record, model: str) -> None:
        if record.tries.answers:
            self._tokens.labels(model, "prompt").inc(record.num_prompt)
            self._tokens.labels(model, "completion").inc(record.tries.num_output)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Regions(Collector):
    """Each region as this edge sees it, looked up when asked for."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        known, now = self._watch.known(), self._watch.now()
        yield _gauge(
            "breaker_open",
            "Whether no call is made to the region: 1 open, 0.5 a probe may be, 0 closed.",
            ((k.region.name, _OPENNESS[k.breaker.state(now)]) for k in known),
        )
        yield _gauge(
            "connected",
            "Whether the link to the region is up.",
            ((k.region.name, float(k.connected)) for k in known),
        )
        yield _gauge(
            "report_age_seconds",
            "Since the region last said how it is.",
            ((k.region.name, now - k.reported_at) for k in known),
        )
        yield _gauge(
            "rtt_seconds",
            "Round trip to the region, smoothed.",
            ((k.region.name, k.rtt_ms / 1000) for k in known if k.rtt_ms is not None),
        )


class _Ledger(Collector):
    """How the ledger is, looked up when asked for."""

    def __init__(self, ledger: Behind) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "edgefire_edge_ledger_pending",
            "Rows of usage that are not written yet.",
            self._ledger.num_pending,
        )
        yield CounterMetricFamily(
            "edgefire_edge_ledger_lost",
            "Rows of usage given up, because their file could not be written for too long.",
            value=self._ledger.num_lost,
        )


class _Kept(Collector):
    """The store and its work, looked up when asked for."""

    def __init__(self, kept: Keeping) -> None:
        self._kept = kept

    def collect(self) -> Iterator[Metric]:
        kept = self._kept
        calls = [([outcome], count) for outcome, count in kept.store_calls.items()]
        yield _counter(
            "store_calls", "Calls of the store: ok, refused, away, left.", ["outcome"], calls
        )
        yield CounterMetricFamily(
            "edgefire_edge_store_busy_seconds",
            "What all calls of the store took, with their waits.",
            value=kept.store_busy_s,
        )
        says = "Requests of jobs answered: ok, failed."
        yield _counter("job_requests", says, ["kind", "outcome"], kept.job_requests.items())
        calls = [([outcome], count) for outcome, count in kept.webhook_calls.items()]
        says = "Calls of webhooks: taken, again, given_up."
        yield _counter("webhook_calls", says, ["outcome"], calls)


_OPENNESS = {State.CLOSED: 0.0, State.HALF_OPEN: 0.5, State.OPEN: 1.0}


def _gauge(name: str, says: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"edgefire_edge_region_{name}", says, labels=["region"])
    for region, value in values:
        family.add_metric([region], value)
    return family


def _counter(
    name: str, says: str, labels: list[str], values: Iterable[tuple[Sequence[str], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"edgefire_edge_{name}", says, labels=labels)
    for label, count in values:
        family.add_metric(label, count)
    return family


def _tell(record: Record, now: float) -> None:
    tries = record.tries
    ttft_s = None if record.first_at is None else record.first_at - record.started
    log(
        logger,
        "request",
        request_id=record.request_id,
        route=record.route,
        account=record.account,
        model=record.model,
        stream=record.stream,
        region=record.region,
        tries=[{"region": c.region, "why": c.reasons} for c in tries.choices],
        failures=[f"{failure.code}: {failure.detail}" for failure in tries.failures],
        prompt_tokens=tries.num_prompt,
        completion_tokens=tries.num_output if record.num_output is None else record.num_output,
        ttft_ms=None if ttft_s is None else round(1000 * ttft_s, 1),
        total_ms=round(1000 * (now - record.started), 1),
        outcome=record.outcome,
        detail=record.detail,
    )
