"""`python -m loadtest.bench.host`: what serving costs the host, in CPU seconds a million tokens."""

from __future__ import annotations

import os
import resource
from typing import Annotated

import anyio
import typer

from loadtest.bench.host_report import lines_of
from loadtest.bench.host_run import Api, Setting, measure

INFIRE_TOKENS_PER_S = 17_224  # at which Infire's CPU was measured: the load, where none is given


def _more_files() -> None:
    """A thousand streams want more file descriptors than a shell gives by default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def host(
    streams: Annotated[list[int] | None, typer.Option(help="At once; once a run.")] = None,
    step_ms: Annotated[
        float | None, typer.Option(help="Of a step; else so that Infire's rate is reached.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Measured one after the other.")] = 3,
    window_s: Annotated[float, typer.Option(min=0.1, help="Seconds a window.")] = 8.0,
    api: Annotated[Api, typer.Option(help="Which of both APIs is asked.")] = "native",
) -> None:
    """What 200 and 1,000 streams cost worker, front and edge, as a Markdown table."""
    _more_files()
    runs = []
    for num_streams in streams or [200, 1000]:
        setting = Setting(
            num_streams=num_streams,
            step_s=num_streams / INFIRE_TOKENS_PER_S if step_ms is None else step_ms / 1000,
            output_tokens=output_tokens,
            api=api,
            num_windows=windows,
            window_s=window_s,
        )
        runs.append(anyio.run(measure, setting, dict(os.environ)))
    print("\n".join(lines_of(runs)))


if __name__ == "__main__":
    typer.run(host)
