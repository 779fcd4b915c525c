"""The exponents of weights as a picture: in characters, or as a file. Counts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unweight.window import WINDOW

_LEAST = 1e-4  # share of weights: rarer exponents are told as one line
_PARTS = " ▏▎▍▌▋▊▉█"
_BIAS = 127


class NoPlots(Exception):
    """The library that draws is not installed."""


def window(exponents: Sequence[int]) -> range:
    """The 15 neighbouring exponents, of 1 to 254, that most weights have: what one 4-bit code could
    say if all rows were alike."""
    starts = range(1, 255 - WINDOW + 1)
    best = max(starts, key=lambda start: sum(exponents[start : start + WINDOW]))
    return range(best, best + WINDOW)


def bars(exponents: Sequence[int], width: int) -> list[str]:
    """A line for each exponent that is not rare: its power of two, a bar, its share; those of the
    best window are marked."""
    total = max(1, sum(exponents))
    inside = window(exponents)
    shown = [n for n, count in enumerate(exponents) if count / total >= _LEAST]
    longest = max((exponents[n] for n in shown), default=1)
    room = max(8, width - 24)
    lines = [
        f"{_name(n):>8} {'│' if n in inside else ' '} "
        f"{_bar(exponents[n] / longest * room):<{room}} {exponents[n] / total:7.3%}"
        for n in shown
    ]
    rare = [count for n, count in enumerate(exponents) if count and n not in shown]
    if rare:
        lines.append(f"{len(rare)} more exponents, together {sum(rare) / total:.2%}")
    covered = sum(exponents[n] for n in inside) / total
    lines.append(f"│ the 15 exponents that most weights have: {covered:.3%}")
    return lines


def draw(exponents: Sequence[int], title: str, path: Path) -> None:
    """The same as a PNG. Raises `NoPlots`, OSError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("--png needs matplotlib: pip install 'edgefire[plots]'") from error
    total = max(1, sum(exponents))
    inside = window(exponents)
    present = [n for n, count in enumerate(exponents) if count]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, numbers, color in (
        ("the 15 that most weights have", [n for n in present if n in inside], "#f38020"),
        ("others", [n for n in present if n not in inside], "#8a8f98"),
    ):
        shares = [exponents[n] / total for n in numbers]
        axes.bar([n - _BIAS for n in numbers], shares, width=0.9, color=color, label=label)
    axes.set(
        title=title,
        xlabel="exponent: weights of 2^e to 2^(e + 1)",
        ylabel="share of weights",
        yscale="log",
    )
    axes.legend()
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _name(exponent: int) -> str:
    match exponent:
        case 0:
            return "0"
        case 255:
            return "Inf NaN"
        case _:
            return f"2^{exponent - _BIAS}"


def _bar(length: float) -> str:
    whole, part = divmod(round(length * 8), 8)
    return "█" * whole + (_PARTS[part] if part else "" if whole else "▏")
