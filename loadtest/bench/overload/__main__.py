"""`python -m loadtest.bench.overload`: who is let in at three times capacity waits how long?

Offers a region as many requests as it can answer, and three times as many, at random times; in turn
to a fleet whose line is bounded by time and to one whose line is bounded by number only. Prints a
Markdown table: TTFT of those let in, and how soon the others knew.
"""

from __future__ import annotations

import os
from typing import Annotated

import anyio
import typer

from loadtest.bench.overload.report import table
from loadtest.bench.overload.run import Setting, measure
from loadtest.bench.processor import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    rows: Annotated[int, typer.Option(min=1, help="That the worker computes at a time.")] = 16,
    step_ms: Annotated[float, typer.Option(min=0.1, help="Of a step.")] = 20.0,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 50,
    window_s: Annotated[float, typer.Option(min=0.5, help="For which requests come.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    setting = Setting(
        rows=rows,
        step_s=step_ms / 1000,
        output_tokens=output_tokens,
        window_s=window_s,
        rounds=rounds,
    )
    windows = anyio.run(measure, setting, dict(os.environ))
    print(
        f"{machine()}; {rows} rows, answers of {output_tokens} tokens in "
        f"{1000 * setting.answer_s:.0f} ms or more, so {setting.capacity:.1f} requests/s; "
        f"{rounds} rounds of {window_s:g} s: median (least-most)\n"
    )
    print(table(windows))


if __name__ == "__main__":
    app()
