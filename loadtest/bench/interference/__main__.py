"""`python -m loadtest.bench.interference`: what a long prompt costs those who are being answered.

Two fleets of two workers with one thread each, side by side: one worker prefills and one decodes,
or both do both. In every round, in turn, each fleet answers the same streams first alone, then
while one long prompt after the other is prefilled; what counts are the gaps between the pieces of
those streams. With `--short`, instead: short prompts, handed over or computed where they are
decoded, and from which length on the one or the other is better for them and for the others.
"""

from __future__ import annotations

import os
from typing import Annotated

import anyio
import typer

from loadtest.bench.beside import Load, measure, measure_short, short_table, table
from loadtest.bench.processor import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    streams: Annotated[int, typer.Option(min=1)] = 4,
    output_tokens: Annotated[int, typer.Option(min=8, help="Of each stream.")] = 192,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompts beside.")] = 2000,
    short: Annotated[bool, typer.Option("--short", help="Compare ways of short prompts.")] = False,
) -> None:
    load = Load(num_streams=streams, output_tokens=output_tokens, prompt_tokens=prompt_tokens)
    work = measure_short if short else measure
    seen = anyio.run(work, load, rounds, dict(os.environ))
    typer.echo(short_table(seen) if short else table(seen))
    typer.echo(
        f"{machine()}; {streams} streams of {output_tokens} tokens, {rounds} rounds in turn; "
        "ms: median, 99th percentile and longest of all gaps; the longest of a round: median, "
        "least and most over rounds."
    )


if __name__ == "__main__":
    app()
