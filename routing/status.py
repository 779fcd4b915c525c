"""What every process of a running fleet says of itself, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import anyio
import httpx2
import msgspec
from msgspec import Struct
from rich.table import Table

from routing.region import ProcessReport, RegionReport
from routing.runs import NoFleet, RunningFleet, RunningProcess
from routing.secret import bearer, read_secret

TIMEOUT_S = 5.0


class Status(Struct, frozen=True, kw_only=True):
    """`fleet status --json`. A process that does not answer is not ready, and its epoch empty."""

    run: str
    model: str
    edge: str  # url
    logs: str
    processes: tuple[ProcessReport, ...]


async def status_of(fleet: RunningFleet) -> Status:
    """Asks the edge of itself and every front of its region; NoFleet when nobody answers."""
    headers = bearer(read_secret(Path(fleet.secret_file)))
    reports: dict[str, ProcessReport] = {}

    async def ask(process: RunningProcess) -> None:
        reports.update((report.name, report) for report in await _ask(client, process))

    async with (
        httpx2.AsyncClient(timeout=TIMEOUT_S, headers=headers, trust_env=False) as client,
        anyio.create_task_group() as tasks,
    ):
        for process in fleet.processes:
            if process.role in {"edge", "front"}:
                tasks.start_soon(ask, process)
    if not reports:
        raise NoFleet(f"the fleet of run {fleet.run} does not answer; its logs: {fleet.logs}")
    return Status(
        run=fleet.run,
        model=fleet.model,
        edge=fleet.edge.url,
        logs=fleet.logs,
        processes=tuple(reports.get(one.name) or _silent(one) for one in fleet.processes),
    )


def table_of(processes: Iterable[ProcessReport]) -> Table:
    table = Table(box=None)
    for title in ("process", "region", "role", "pid", "url", "ready"):
        table.add_column(title, no_wrap=title in {"process", "url"})
    for title in ("in flight", "waiting", "held", "free blocks", "blocks"):
        table.add_column(title, justify="right")
    for one in processes:
        table.add_row(*_words(one), style=None if one.ready else "red")
    return table


def _words(one: ProcessReport) -> Sequence[str]:
    ready = "yes" if one.ready else "no" if one.epoch else "no answer"
    counts = [one.in_flight, one.waiting, one.held]
    blocks = [one.free_blocks, one.total_blocks] if one.total_blocks else ["-", "-"]
    who = [one.name, one.region or "-", one.role, one.pid, one.url, ready]
    return [str(word) for word in (*who, *counts, *blocks)]


async def _ask(client: httpx2.AsyncClient, process: RunningProcess) -> Sequence[ProcessReport]:
    """Its own report (an edge) or those of its region (a front); none when it does not answer."""
    try:
        answer = await client.get(f"{process.url}/v1/report")
        answer.raise_for_status()
        if process.role == "edge":
            return [msgspec.json.decode(answer.content, type=ProcessReport)]
        return msgspec.json.decode(answer.content, type=RegionReport).processes
    except (httpx2.HTTPError, msgspec.DecodeError):
        return []


def _silent(process: RunningProcess) -> ProcessReport:
    return ProcessReport(**msgspec.structs.asdict(process), epoch="", ready=False)
