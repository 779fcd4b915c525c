"""`loadtest run`: locust users against a running fleet, then the table and who was served where."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from loadtest.report import lines_of, matrix_of, summarise, table_of
from loadtest.run import Load, Target, new_folder, run_locust
from loadtest.samples import read_samples
from routing.keys import NoKey, create_key
from routing.paths import paths
from routing.runs import NoFleet, running_fleet

ACCOUNT = "loadtest"

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
news = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False)


@app.callback()
def loadtest() -> None:
    """Load for a fleet."""


@app.command()
def run(  # noqa: PLR0913  one parameter a flag
    users: Annotated[int, typer.Option(min=1, help="At once, half of them in Europe.")] = 20,
    time: Annotated[int, typer.Option(min=1, help="Seconds.")] = 60,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    url: Annotated[str | None, typer.Option(help="An edge; else the fleet running here.")] = None,
    token: Annotated[str | None, typer.Option(help="A key; else a new one is made.")] = None,
    account: Annotated[str, typer.Option(help="The key's.")] = ACCOUNT,
    model: Annotated[str | None, typer.Option(help="Else the running fleet's.")] = None,
) -> None:
    """Users that ask and read streamed answers for a while. Exit code 1 when any request failed."""
    if find_spec("locust") is None:
        _fail("locust is not installed: .venv/bin/pip install -e '.[load]'")
    try:
        target = _target(url, token, account, model)
    except (NoFleet, NoKey) as exc:
        _fail(str(exc))
    load = Load(users=users, duration_s=time, max_tokens=max_tokens)
    folder = new_folder(paths(os.environ).state)
    samples = list(read_samples(run_locust(target, load, folder, os.environ)))
    news.print(f"Every request, and locust's own statistics: {folder}")
    if not samples:
        _fail((folder / "locust.log").read_text(errors="replace") + "\nno request was made")
    report = summarise(samples)
    for part in (table_of(report), *lines_of(report), "", matrix_of(report)):
        out.print(part)
    sys.exit(1 if report.num_errors else 0)


def _target(url: str | None, token: str | None, account: str, model: str | None) -> Target:
    """As asked; what was not said is the running fleet's, with a new key of one day."""
    if url and token and model:
        return Target(url=url, account=account, token=token, model=model)
    fleet = running_fleet(paths(os.environ).state)
    return Target(
        url=url or fleet.edge.url,
        account=account,
        token=token or create_key(Path(fleet.keys_dir), os.environ, account),
        model=model or fleet.model,
    )


def _fail(why: str) -> NoReturn:
    news.print(why, style="red", markup=False)
    sys.exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
