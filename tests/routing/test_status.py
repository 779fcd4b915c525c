"""`fleet status`: every process of the run, whether or not it answers."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from routing.region import ProcessReport, RegionReport, Role
from routing.runs import (
    NoFleet,
    RunningFleet,
    RunningProcess,
    held,
    new_run,
    running_fleet,
    say_running,
    say_stopped,
)
from routing.secret import NeedsSecret
from routing.status import status_of, table_of
from tests.fakes.serving import serving

GONE = "http://127.0.0.1:9"  # the discard port, where nobody listens


def report(name: str, role: Role, region: str = "weur", free_blocks: int = 0) -> ProcessReport:
    return ProcessReport(
        name=name,
        region=region,
        role=role,
        pid=7,
        url=GONE,
        epoch="e",
        in_flight=3,
        free_blocks=free_blocks,
        total_blocks=64 if free_blocks else 0,
    )


@asynccontextmanager
async def answering(report: msgspec.Struct) -> AsyncIterator[str]:
    """A process whose /v1/report says this, to those who have the secret."""

    async def endpoint(_: Request) -> Response:
        return Response(msgspec.json.encode(report), media_type="application/json")

    guard = Middleware(NeedsSecret, secret="a-secret")
    async with serving(
        Starlette(routes=[Route("/v1/report", endpoint)], middleware=[guard])
    ) as url:
        yield url


def fleet(folder: Path, secret: str = "a-secret", **urls: str) -> RunningFleet:
    """An edge, and a front with one worker in each of two regions."""
    secret_file = folder / "secret"
    secret_file.write_text(secret)
    rows: list[tuple[str, str, Role]] = [
        ("edge-0", "", "edge"),
        ("weur-front", "weur", "front"),
        ("weur-both-0", "weur", "both"),
        ("enam-front", "enam", "front"),
        ("enam-both-0", "enam", "both"),
    ]
    return RunningFleet(
        run=folder.name,
        launcher=1,
        model="@cf/m",
        secret_file=str(secret_file),
        keys_dir="",
        logs=str(folder / "logs"),
        processes=tuple(
            RunningProcess(
                name=name,
                region=region,
                role=role,
                pid=100 + i,
                url=urls.get(name.replace("-", "_"), GONE),
            )
            for i, (name, region, role) in enumerate(rows)
        ),
    )


async def test_every_process_is_shown_and_the_silent_ones_say_so(tmp_path: Path) -> None:
    region = RegionReport(
        region="weur",
        epoch="e",
        room=8,
        models=(),
        processes=(report("weur-front", "front"), report("weur-both-0", "both", free_blocks=60)),
    )
    async with answering(report("edge-0", "edge", "")) as edge, answering(region) as front:
        status = await status_of(fleet(tmp_path, edge_0=edge, weur_front=front))
    by_name = {one.name: one for one in status.processes}
    assert list(by_name) == ["edge-0", "weur-front", "weur-both-0", "enam-front", "enam-both-0"]
    assert by_name["edge-0"].in_flight == 3
    assert (by_name["weur-both-0"].free_blocks, by_name["weur-both-0"].total_blocks) == (60, 64)
    assert [one.name for one in status.processes if not one.ready] == ["enam-front", "enam-both-0"]
    assert by_name["enam-both-0"].pid == 104

    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(table_of(status.processes))
    lines = {line.split()[0]: line.split() for line in screen.export_text().splitlines() if line}
    assert lines["weur-both-0"][3:] == ["7", GONE, "yes", "3", "0", "0", "60", "64"]
    assert lines["enam-front"][5:7] == ["no", "answer"]
    assert lines["edge-0"][1] == "-"


async def test_a_fleet_where_nobody_answers_is_no_fleet(tmp_path: Path) -> None:
    with pytest.raises(NoFleet, match="does not answer"):
        await status_of(fleet(tmp_path))


async def test_a_wrong_secret_gets_no_report(tmp_path: Path) -> None:
    async with answering(report("edge-0", "edge", "")) as edge:
        with pytest.raises(NoFleet):
            await status_of(fleet(tmp_path, secret="another", edge_0=edge))


def test_the_latest_run_is_found_until_it_stops(tmp_path: Path) -> None:
    first, second = new_run(tmp_path), new_run(tmp_path)
    assert first.stat().st_mode & 0o777 == 0o700
    say_running(first, fleet(first))
    say_running(second, fleet(second))
    assert running_fleet(tmp_path).run == second.name
    say_stopped(first)  # which is not the latest any more
    assert running_fleet(tmp_path).run == second.name
    say_stopped(second)
    with pytest.raises(NoFleet, match="no fleet is running"):
        running_fleet(tmp_path)


def test_of_two_runs_the_one_that_goes_on_is_found(tmp_path: Path) -> None:
    first, second, killed = (new_run(tmp_path) for _ in range(3))
    with held(killed):
        say_running(killed, fleet(killed))
    with held(first):
        say_running(first, fleet(first))
        with held(second):
            say_running(second, fleet(second))
            say_stopped(second)
        assert running_fleet(tmp_path).run == first.name
        say_stopped(first)
    with pytest.raises(NoFleet):
        running_fleet(tmp_path)
