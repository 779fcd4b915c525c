"""Figures as Markdown, and a part of a file that is written by program. No measuring.

A part lies between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, each on a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a machine with a GPU and little else can write tables
    from loadtest.bench.measure import Served


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def number(value: float) -> str:
    """Three digits that count, as people read them: 0.69, 20.1, 1,535."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """The median, and least and most."""
    if not values:
        return "-"
    return f"{number(median(values))} ({number(min(values))}-{number(max(values))})"


def with_part(text: str, name: str, part: str) -> str:
    """`text` with `part` in the place of what was between the marks. ValueError without them."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, mark, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not (mark and closing):
        raise ValueError(f"no line {begin.strip()!r} with {end.strip()!r} after it")
    return before + begin + part + end + after


def served_table(served: Served) -> str:
    """One server's figures."""
    heads = ["streams", "TTFT p50 / p99, ms", "inter-token p50 / p99, ms"]
    heads += ["one stream, tok/s", "output, tok/s", "answers", "ended early", "client, of a core"]
    rows = [
        [
            str(level.concurrency),
            f"{number(level.ttft_p50_ms)} / {number(level.ttft_p99_ms)}",
            f"{number(level.gap_p50_ms)} / {number(level.gap_p99_ms)}",
            number(level.decode_rate),
            number(level.output_rate),
            str(level.requests),
            str(level.num_short),
            f"{100 * level.client_share:.0f} %",
        ]
        for level in served.levels
    ]
    prefills = [
        [f"{one.prompt_tokens:,}", number(one.rate), str(one.requests)] for one in served.prefills
    ]
    table = markdown(heads, rows)
    return table + "\n" + markdown(["prompt", "prefill, tok/s", "answers"], prefills)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
