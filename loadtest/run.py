"""Locust as a process of its own: it patches Python's sockets for gevent, so nothing imports it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
FINISH_S = 60  # after its time is up, for answers that are under way
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, for what, as whom."""

    url: str
    account: str
    token: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    users: int
    duration_s: int
    max_tokens: int  # of each answer


def new_folder(state: Path) -> Path:
    """Where one load test leaves what it measured."""
    folder = state / "loadtest" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    return folder


def locust_command(target: Target, load: Load, samples: Path) -> list[str]:
    """Without the token, which goes by the environment: command lines are for all to see."""
    words = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless"]
    words += [
        "--only-summary",
        "--stop-timeout",
        str(FINISH_S),
        "--run-time",
        f"{load.duration_s}s",
    ]
    words += ["--users", str(load.users), "--spawn-rate", str(load.users), "--host", target.url]
    words += ["--account", target.account, "--model", target.model]
    return [*words, "--max-tokens", str(load.max_tokens), "--samples", str(samples)]


def run_locust(target: Target, load: Load, folder: Path, environ: Mapping[str, str]) -> Path:
    """The file of samples, one a request. What locust says goes to `folder`/locust.log.

    ^C ends the load early and keeps what was measured.
    """
    samples = folder / "samples.jsonl"
    with (folder / "locust.log").open("wb") as log:
        locust = subprocess.Popen(
            locust_command(target, load, samples),
            env={**environ, "EDGEFIRE_TOKEN": target.token},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _show(locust, load)
        except KeyboardInterrupt:  # the terminal sent it to locust too
            locust.wait(FINISH_S)
        finally:
            locust.kill()
            locust.wait()
    return samples


def _show(locust: subprocess.Popen[bytes], load: Load) -> None:
    """A bar of the time, until locust has ended."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{load.users} users", total=load.duration_s)
        start = time.monotonic()
        while locust.poll() is None:
            progress.update(bar, completed=min(time.monotonic() - start, load.duration_s))
            time.sleep(POLL_S)
        progress.update(bar, completed=load.duration_s)
