"""What a load test found: the table, and the matrix of who was served where. No I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from loadtest.samples import Sample

NOWHERE = "(none)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    requests: int
    errors: Counter[str]  # message: how often
    ttft_s: list[float]  # ascending, as the next two
    gaps_s: list[float]
    rates: list[float]  # tokens a second to one user while an answer flowed
    completion_tokens: int  # of all answers
    duration_s: float  # from the first request to the last answer
    served: Counter[tuple[str, str]]  # (where the client is, region): requests

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def total_rate(self) -> float:
        """Tokens a second, all users together."""
        return self.completion_tokens / self.duration_s if self.duration_s else 0.0


def summarise(samples: Iterable[Sample]) -> Report:
    all_of_them = list(samples)
    good = [sample for sample in all_of_them if sample.error is None]
    return Report(
        requests=len(all_of_them),
        errors=Counter(sample.error for sample in all_of_them if sample.error is not None),
        ttft_s=sorted(sample.ttft_s for sample in good if sample.ttft_s is not None),
        gaps_s=sorted(gap for sample in good for gap in sample.gaps_s),
        rates=sorted(rate for sample in good if (rate := sample.tokens_per_s) is not None),
        completion_tokens=sum(sample.completion_tokens for sample in good),
        duration_s=_duration_s(all_of_them),
        served=Counter((sample.client, sample.region or NOWHERE) for sample in all_of_them),
    )


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of values does not exceed; NaN of none."""
    if not ascending:
        return math.nan
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def table_of(report: Report) -> Table:
    table = Table("measure", box=None, title="Load test", title_justify="left")
    for title in ("p50", "p95", "p99", "n"):
        table.add_column(title, justify="right")
    _row(table, "time to first token, ms", [1000 * value for value in report.ttft_s])
    _row(table, "inter-token latency, ms", [1000 * value for value in report.gaps_s])
    _row(table, "tokens/s to one user, at least", report.rates, low=True)
    return table


def lines_of(report: Report) -> list[str]:
    """What needs no percentiles."""
    lines = [
        f"{report.requests} requests in {report.duration_s:.1f} s, {report.num_errors} failed",
        f"{report.completion_tokens} tokens, {report.total_rate:.1f} tokens/s in total",
    ]
    return [*lines, *(f"  {count} x {error}" for error, count in report.errors.most_common())]


def matrix_of(report: Report) -> Table:
    """Rows: where clients are. Columns: the regions that served them."""
    clients = sorted({client for client, _ in report.served})
    regions = sorted({region for _, region in report.served})
    table = Table("client", box=None, title="Served by", title_justify="left")
    for region in regions:
        table.add_column(region, justify="right")
    for client in clients:
        table.add_row(client, *(str(report.served[client, region]) for region in regions))
    return table


def _row(table: Table, name: str, ascending: Sequence[float], *, low: bool = False) -> None:
    """`low`: the bad end is the low one, as of a rate."""
    shares = (0.5, 0.05, 0.01) if low else (0.5, 0.95, 0.99)
    values = [percentile(ascending, share) for share in shares]
    shown = ["-" if math.isnan(value) else f"{value:.1f}" for value in values]
    table.add_row(name, *shown, str(len(ascending)))


def _duration_s(samples: Sequence[Sample]) -> float:
    if not samples:
        return 0.0
    return max(sample.ended for sample in samples) - min(sample.sent for sample in samples)
