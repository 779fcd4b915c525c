"""The table of an overload bench: medians of rounds, with the least and the most. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from loadtest.bench.overload.run import Window
from loadtest.bench.table import markdown, spread

_HEADS = (
    "line, load",
    "asked",
    "let in",
    "TTFT p50, ms",
    "TTFT p95, ms",
    "whole answer p50, ms",
    "refusal p50, ms",
    "refusal p99, ms",
)


def table(windows: Iterable[Window]) -> str:
    """A row a kind and load: the median over its windows (least-most)."""
    alike: dict[tuple[str, float], list[Window]] = {}
    for window in windows:
        alike.setdefault((window.kind, window.load), []).append(window)
    return markdown(_HEADS, [_row(kind, load, of) for (kind, load), of in sorted(alike.items())])


def _row(kind: str, load: float, windows: Sequence[Window]) -> list[str]:
    asked = [len(it.ttft_s) + len(it.refused_s) for it in windows]
    shares = [
        100 * len(it.ttft_s) / count for it, count in zip(windows, asked, strict=True) if count
    ]
    return [
        f"{kind}, {load:g} x",
        f"{sum(asked)}",
        f"{median(shares):.0f} %" if shares else "-",
        spread([1000 * at(it.ttft_s, 0.5) for it in windows if it.ttft_s]),
        spread([1000 * at(it.ttft_s, 0.95) for it in windows if it.ttft_s]),
        spread([1000 * at(it.total_s, 0.5) for it in windows if it.total_s]),
        spread([1000 * at(it.refused_s, 0.5) for it in windows if it.refused_s]),
        spread([1000 * at(it.refused_s, 0.99) for it in windows if it.refused_s]),
    ]


def at(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
