"""Figures as a bench would have measured them, for tests of what is made of them."""

from __future__ import annotations

from loadtest.bench.measure import Level


def level(concurrency: int = 1, rate: float = 7.0, *, num_short: int = 0) -> Level:
    """So many streams, each and all of them at `rate`."""
    return Level(
        concurrency=concurrency,
        requests=3,
        num_short=num_short,
        ttft_p50_ms=1.0,
        ttft_p99_ms=1.0,
        gap_p50_ms=1.0,
        gap_p99_ms=1.0,
        decode_rate=rate,
        output_rate=rate,
        client_share=0.05,
    )
