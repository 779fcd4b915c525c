"""`python -m loadtest.bench.soak`: a fleet under traffic and faults for minutes; then, is all well?

Two regions of two prefill and two decode workers, two edges, engines whose every answer is known.
Linux only.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import anyio
import typer

from loadtest.bench.processor import machine
from loadtest.bench.soak.run import Soak, soak


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    seed: Annotated[int, typer.Option(help="Of what is asked, and of what goes wrong.")] = 1,
    clients: Annotated[int, typer.Option(min=1)] = 12,
    fault_every_s: Annotated[float, typer.Option(min=0.1, help="On average.")] = 4.0,
    step_ms: Annotated[float, typer.Option(min=0.0, help="Of an engine.")] = 20.0,
    folder: Annotated[
        Path | None, typer.Option(help="New; keeps logs, ledger and journals.", file_okay=False)
    ] = None,
) -> None:
    """Exit code 1 when a check fails; the folder is then kept, too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    place = folder or Path(tempfile.mkdtemp(prefix="edgefire-soak-")) / "run"
    asked = Soak(
        time_s=60 * minutes,
        seed=seed,
        num_clients=clients,
        fault_every_s=fault_every_s,
        step_s=step_ms / 1000,
        folder=place,
    )
    told, passed = anyio.run(soak, asked, dict(os.environ))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. {minutes:g} minutes, seed {seed}.\n")
    print(told)
    if not passed:
        sys.exit(f"logs, ledger and journals: {place}")
    if folder is None:
        shutil.rmtree(place.parent)


if __name__ == "__main__":
    typer.run(main)
