"""The bench's figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtest.bench.gpu.measure import Row
from loadtest.bench.table import markdown, number


def rows_table(rows: Sequence[Row]) -> str:
    """A line for each matrix and number of rows."""
    heads = ["matrix", "M", "torch us", "TB/s", "BF16 twin us", "fused us", "TB/s", "fused gain"]
    heads += ["spread", "decoded us", "error torch / fused"]
    lines = []
    for row in rows:
        weights = row.shape[0] * row.shape[1]
        low, high = row.spread("fused")
        lines.append(
            [
                f"{row.name} {row.shape[0]} x {row.shape[1]}",
                str(row.num_rows),
                number(row.us("torch")),
                number(2 * weights / row.us("torch") / 1e6),
                number(row.us("twin")),
                number(row.us("fused")),
                number(1.5 * weights / row.us("fused") / 1e6),
                f"**{row.gain('fused'):.2f}x**",
                f"{low:.2f} to {high:.2f}",
                number(row.us("decoded")),
                f"{row.errors['torch']:.1e} / {row.errors['fused']:.1e}",
            ]
        )
    return markdown(heads, lines)


def layer_table(layers: Mapping[int, tuple[float, float, float]]) -> str:
    """By rows: microseconds of a layer's products in BF16, as planned, and the gain."""
    heads = ["M", "four products in BF16, us", "as planned, us", "gain"]
    lines = [
        [str(num_rows), number(raw), number(planned), f"{gain:.2f}x"]
        for num_rows, (raw, planned, gain) in layers.items()
    ]
    return markdown(heads, lines)
