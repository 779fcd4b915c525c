"""The `fleet` command: start a fleet on this machine, pull a model, see how each process is."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import anyio
import msgspec
import typer
from rich.console import Console

from routing.catalogue import load_catalogue
from routing.control import Asked, ask
from routing.errors import Failure
from routing.fleetfile import Device, FleetFileError, read_fleet
from routing.keys import NoKey
from routing.launch import INTERRUPTED, Launch, UpSettings, choose_fleet, prepare
from routing.ledgers import NoUsage, found_files
from routing.ledgers import reconcile as reconciled
from routing.paths import paths
from routing.preflight import free_memory_bytes, usable_cores
from routing.pull import PullFailed, pull_model
from routing.region import Task
from routing.rows import CANNOT as UNREADABLE
from routing.runs import NoFleet, running_fleet
from routing.screen import Screen
from routing.secret import read_secret
from routing.status import status_of, table_of

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
screen = Screen()
PIPED_WIDTH = 160  # characters of a table that is not shown on a terminal

# What is told without a trace: the person who typed the command can mend it.
CANNOT = (FleetFileError, NoKey, PullFailed, Failure, ValueError, OSError)

Catalogue = Annotated[
    Path | None, typer.Option(help="More rows, in the form of routing/data/models.toml.")
]
StateDir = Annotated[Path | None, typer.Option("--state", help="Where runs are kept.")]


@app.command()
def up(
    fleet: Annotated[Path | None, typer.Option(help="A fleet file; see routing/data.")] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU that works, else the CPU.")] = "auto",
    model_dir: Annotated[Path | None, typer.Option(help="A folder, instead of pulling.")] = None,
    catalogue: Catalogue = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="Stop after the first answer.")] = False,
    first_run: Annotated[bool, typer.Option(help="Ask one question when all is ready.")] = True,
) -> None:
    """Start a fleet, show a first streamed answer, stay up until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the fleet runs, as ^C
    path, said = choose_fleet(fleet, free_memory_bytes())
    if said:
        screen.say(said)
    settings = UpSettings(
        paths=paths(os.environ),
        environ=os.environ,
        device=device,
        once=once,
        first_run=first_run,
        cores=usable_cores(),
    )
    try:
        layout = read_fleet(path)
        folder = model_dir or _pull(layout.fleet.model, catalogue)
        others = {model: _pull(model, catalogue) for model in layout.other_models}
        row = load_catalogue(catalogue).rows.get(layout.fleet.model)
        task: Task = row.task if row else "text-generation"
        prepared = prepare(settings, layout, folder, screen.say, other_dirs=others, task=task)
        code = anyio.run(Launch(settings, prepared, screen).run)
    except CANNOT as exc:
        _fail(str(exc))
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="As in routing/data/models.toml.")],
    catalogue: Catalogue = None,
) -> None:
    """Fetch a model of the catalogue, unless it is here. Prints its folder."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its child is stopped, as by ^C
    try:
        screen.result(str(_pull(model, catalogue)))
    except CANNOT as exc:
        _fail(str(exc))


@app.command()
def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    state: StateDir = None,
) -> None:
    """How every process of the running fleet is, as it says itself."""
    try:
        seen = anyio.run(status_of, running_fleet(state or paths(os.environ).state))
    except NoFleet as exc:
        _fail(str(exc))
    if as_json:
        screen.result(msgspec.json.format(msgspec.json.encode(seen)).decode())
    else:
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        Console(width=width).print(table_of(seen.processes))


@app.command()
def scale(
    region: Annotated[str, typer.Argument(help="As in the fleet file.")],
    counts: Annotated[list[str], typer.Argument(help="prefill=2 decode=1 both=0")],
    state: StateDir = None,
) -> None:
    """Have other numbers of workers in a region of the running fleet. No request fails by it."""
    try:
        fleet = running_fleet(state or paths(os.environ).state)
        if not fleet.control:
            raise NoFleet("the fleet is still starting")
        secret = read_secret(Path(fleet.secret_file))
        asked = Asked(secret=secret, region=region, counts=_counts(counts))
        answered = anyio.run(ask, fleet.control, asked)
    except (NoFleet, ValueError, OSError) as exc:
        _fail(str(exc))
    if answered.error:
        _fail(answered.error)
    said = [f"{count} {role}" for role, count in answered.counts.items() if count]
    screen.result(f"{region}: {', '.join(said)}")


def _counts(words: list[str]) -> dict[str, int]:
    """`prefill=2` as a number by role; ValueError says which is not like that, or comes twice."""
    counts: dict[str, int] = {}
    for word in words:
        role, _, number = word.partition("=")
        if not role or not number.isdecimal():
            raise ValueError(f"{word!r} is not like prefill=2")
        if role in counts:
            raise ValueError(f"{role} is there twice")
        counts[role] = int(number)
    return counts


@app.command()
def reconcile(
    ledger: Annotated[list[Path] | None, typer.Option(help="An edge's; once for each.")] = None,
    journal: Annotated[list[Path] | None, typer.Option(help="A front's; once for each.")] = None,
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Add missing rows to a ledger.")] = False,
    settle_s: Annotated[
        float, typer.Option(help="So long after its end at a front, a request may be at its edge.")
    ] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    state: StateDir = None,
) -> None:
    """Compare edges' ledgers with fronts' journals. Without files: those of `fleet up` here.

    Exit code 1: rows are missing and were not added, or a ledger has less than was made.
    """
    ledgers, journals = found_files((state or paths(os.environ).state) / "usage")
    try:
        done = reconciled(ledger or ledgers, journal or journals, settle_s=settle_s, apply=apply)
    except (NoUsage, *UNREADABLE) as exc:
        _fail(str(exc))
    if as_json:
        screen.result(msgspec.json.format(msgspec.json.encode(done)).decode())
    else:
        screen.result("\n".join(done.lines()))
    sys.exit(0 if done.settled else 1)


def _pull(model: str, catalogue: Path | None) -> Path:
    return pull_model(load_catalogue(catalogue).row(model), paths(os.environ).cache)


def _fail(why: str) -> NoReturn:
    screen.complain(why)
    sys.exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
