"""`python -m loadtest.bench.edge`: what an edge costs, CPU and time, over a region that sleeps."""

from __future__ import annotations

import os
import resource
from typing import Annotated

import anyio
import typer

from loadtest.bench.edge_run import measure


def edge(
    streams: Annotated[int, typer.Option(min=1, help="At once.")] = 200,
    step_ms: Annotated[float, typer.Option(help="Of a step of the region.")] = 20.0,
    windows: Annotated[int, typer.Option(min=1, help="Measured one after the other.")] = 5,
    window_s: Annotated[float, typer.Option(min=0.1, help="Seconds a window.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=3, help="Requests of which the time is taken.")] = 301,
) -> None:
    """What an edge costs, as a Markdown table."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    anyio.run(measure, os.environ, streams, step_ms, windows, window_s, rounds)


if __name__ == "__main__":
    typer.run(edge)
