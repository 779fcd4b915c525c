"""What a worker counts, for Prometheus. Labels are bounded: roles and known outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from origin_gpu.engine_link import EngineLink

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
        self._kv_bytes = Counter(
            "edgefire_worker_kv_collected_bytes",
            "KV collected from other workers, by the way it went.",
            ("way",),
            registry=registry,
        )
        self._kv_seconds = Histogram(
            "edgefire_worker_kv_collect_seconds",
            "From asking another worker for KV to having all of it.",
            ("way",),
            buckets=SECONDS,
            registry=registry,
        )
        self._kv_refused = Counter(
            "edgefire_worker_kv_refused",
            "KV not given, or not taken, by which end refused it and why.",
            ("end", "reason"),
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

    def refused(self, end: Literal["door", "collector"], reason: str) -> None:
        """`reason`: of `kv_transfer.Denied`, or a code."""
        self._kv_refused.labels(end, reason).inc()

    def collected(self, way: str, num_bytes: int, seconds: float) -> None:
        self._kv_bytes.labels(way).inc(num_bytes)
        self._kv_seconds.labels(way).observe(seconds)


class EngineCollector(Collector):
    """The engine's own gauges, read when somebody asks."""

    def __init__(self, engine: EngineLink) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        now = self._engine.gauges
        for name, value, about in (
            ("up", float(self._engine.hello is not None), "1 while it has loaded and lives."),
            ("running", now.running, "Sequences that steps compute."),
            ("waiting", now.waiting, "Sequences that wait for blocks or a slot."),
            ("held", now.held, "Finished prefills whose KV waits to be collected."),
            ("free_blocks", now.free_blocks, "KV blocks that are free."),
            ("total_blocks", now.total_blocks, "KV blocks in all."),
            ("host_cache_blocks", now.host_blocks, "Of the prefix cache, in host memory."),
            ("disk_cache_blocks", now.disk_blocks, "Of the prefix cache, in files."),
            ("step_seconds", now.step_s, "How long the last step took."),
        ):
            yield GaugeMetricFamily(f"edgefire_engine_{name}", about, value=value)
        for name, value, about in (
            ("starts", self._engine.num_starts, "Engine processes started by this worker."),
            ("steps", now.step, "Steps made."),
            ("prompt_tokens_computed", now.prompt_tokens_computed, "Prompt tokens computed here."),
            ("output_tokens", now.output_tokens, "Tokens sampled."),
            ("prompt_tokens_cached", now.prompt_tokens_cached, "Prompt tokens found in blocks."),
            ("host_cache_found", now.host_blocks_found, "Blocks loaded from host memory."),
            ("disk_cache_found", now.disk_blocks_found, "Blocks loaded from files."),
            ("preemptions", now.preemptions, "Sequences put back for want of blocks."),
            ("draft_tokens_proposed", now.draft_tokens_proposed, "Tokens guessed and verified."),
            ("draft_tokens_accepted", now.draft_tokens_accepted, "Guessed tokens that were right."),
        ):
            yield CounterMetricFamily(f"edgefire_engine_{name}", about, value=value)
