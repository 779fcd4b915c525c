"""What a worker counts, for Prometheus. Labels are bounded: roles and known outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infire.notes import Gauges

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class WorkerMetrics:
    """The instruments of one worker, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            "edgefire_worker_requests",
            "Requests that ended, by role and outcome.",
            ("role", "outcome"),
            registry=registry,
        )
        self._tokens = Counter(
            "edgefire_worker_output_tokens",
            "Tokens made for requests that ended.",
            ("role",),
            registry=registry,
        )
        self._seconds = Histogram(
            "edgefire_worker_request_seconds",
            "From a request's arrival at the worker to its end.",
            ("role",),
            buckets=SECONDS,
            registry=registry,
        )

    def ended(self, role: str, outcome: str, seconds: float, output_tokens: int) -> None:
        self._requests.labels(role, outcome).inc()
        self._tokens.labels(role).inc(output_tokens)
        self._seconds.labels(role).observe(seconds)


class EngineCollector(Collector):
    """The engine's own gauges, read when somebody asks."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        now = self._gauges()
        for name, value, about in (
            ("running", now.running, "Sequences that steps compute."),
            ("waiting", now.waiting, "Sequences that wait for blocks or a slot."),
            ("held", now.held, "Finished prefills whose KV waits to be collected."),
            ("free_blocks", now.free_blocks, "KV blocks that are free."),
            ("total_blocks", now.total_blocks, "KV blocks in all."),
            ("step_seconds", now.step_s, "How long the last step took."),
        ):
            yield GaugeMetricFamily(f"edgefire_engine_{name}", about, value=value)
        for name, value, about in (
            ("steps", now.step, "Steps made."),
            ("prompt_tokens_computed", now.prompt_tokens_computed, "Prompt tokens computed here."),
            ("output_tokens", now.output_tokens, "Tokens sampled."),
            ("preemptions", now.preemptions, "Sequences put back for want of blocks."),
        ):
            yield CounterMetricFamily(f"edgefire_engine_{name}", about, value=value)
