"""What a front counts, for Prometheus. Labels are bounded: models it has served, known outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from origin_gpu.pool import Pool
from routing.link_frames import LinkStats

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class FrontMetrics:
    """The instruments of one front, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "edgefire_front_requests",
            "Requests that ended, by model and outcome.",
            ("model", "outcome"),
            registry=registry,
        )
        self.tokens = Counter(
            "edgefire_front_tokens",
            "Tokens of requests that ended.",
            ("model", "kind"),
            registry=registry,
        )
        self.ttft_s = Histogram(
            "edgefire_front_ttft_seconds",
            "From a request's arrival to its first token.",
            ("model",),
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.placements = Counter(
            "edgefire_front_placements",
            "Requests that were placed, by way: on two workers, on one, or on one for its cache.",
            ("way",),
            registry=registry,
        )
        self.cached_tokens = Counter(
            "edgefire_front_cached_tokens",
            "Prompt tokens that a prefix cache was expected to have, and that it had.",
            ("kind",),
            registry=registry,
        )
        self.in_flight = Gauge(
            "edgefire_front_in_flight",
            "Requests that have not ended.",
            registry=registry,
        )
        self.second_tries = Counter(
            "edgefire_front_second_tries",
            "Requests computed anew because a worker was lost or refused, by why.",
            ("reason",),
            registry=registry,
        )


class PoolCollector(Collector):
    """Workers and link frames, read when somebody asks."""

    def __init__(self, pool: Pool, edges: LinkStats) -> None:
        self._pool = pool
        self._edges = edges

    def collect(self) -> Iterator[Metric]:
        """One sample a worker, and one a direction of each link."""
        up = GaugeMetricFamily(
            "edgefire_front_worker_up", "1 while a worker is ready.", labels=("worker", "role")
        )
        keys = GaugeMetricFamily(
            "edgefire_front_worker_cached_blocks",
            "Blocks that a worker said it has in its prefix cache.",
            labels=("worker",),
        )
        tokens = GaugeMetricFamily(
            "edgefire_front_worker_tokens", "Tokens in flight at a worker.", labels=("worker",)
        )
        ends: dict[str, LinkStats] = {"edges": self._edges}
        for name, member in self._pool.members.items():
            up.add_metric((name, member.at.role), float(member.candidate() is not None))
            tokens.add_metric((name,), float(member.tokens_in_flight))
            keys.add_metric((name,), float(self._pool.prefixes.num_keys_of(name)))
            ends[name] = member.link.stats
        yield up
        yield keys
        yield CounterMetricFamily(
            "edgefire_front_cache_resyncs",
            "Times that news of a worker's cache were lost, and all was asked for anew.",
            value=self._pool.num_resyncs,
        )
        yield tokens
        yield _frames(ends)


def _frames(ends: Mapping[str, LinkStats]) -> CounterMetricFamily:
    frames = CounterMetricFamily(
        "edgefire_front_link_frames", "WebSocket messages.", labels=("peer", "direction")
    )
    for peer, stats in ends.items():
        frames.add_metric((peer, "sent"), float(stats.frames_sent))
        frames.add_metric((peer, "received"), float(stats.frames_received))
    return frames
