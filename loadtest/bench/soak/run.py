"""One soak: fleet up, traffic and faults, calm, and every check there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec

from loadtest.bench.soak.asks import NEAR, TENANTS, Asked
from loadtest.bench.soak.checks import (
    Check,
    Deaths,
    answers_check,
    findings_check,
    rows_check,
    table,
    told_check,
)
from loadtest.bench.soak.clients import Clients
from loadtest.bench.soak.faults import Faults
from loadtest.bench.soak.fleet import Fleet, left_files, soaked_fleet
from origin_gpu.kv_files import roots
from routing.keys import create_key
from routing.ledgers import found_files, reconcile
from routing.rows import by_request, connected
from routing.usage import LEDGER, LedgerRow

CALM_S = 1.0  # before the first fault and after the last
TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What is asked for."""

    time_s: float
    seed: int
    num_clients: int
    fault_every_s: float
    step_s: float
    folder: Path  # a new one


async def soak(asked: Soak, environ: Mapping[str, str]) -> tuple[str, bool]:
    """The closing table, and whether every check was passed."""
    checks: list[Check] = []
    async with soaked_fleet(asked.folder, environ, step_s=asked.step_s) as fleet:
        keys = {name: create_key(fleet.folder / "keys", environ, name) for name in TENANTS}
        edges = [child.command.name for child in fleet.edges]
        urls = [child.command.url for child in fleet.edges]
        clients, faults = Clients(urls, keys, asked.seed), Faults(fleet, asked.seed)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(clients.run, asked.num_clients)
            with anyio.move_on_after(asked.time_s):
                await anyio.sleep(CALM_S)
                await faults.run(asked.fault_every_s)
            clients.stopping = True
        late = await fleet.wait_ready()
        checks.append(Check(name="all ready again", problems=late, seen=_processes(fleet)))
        last = Clients(urls, keys, asked.seed)  # without connections of before
        checks.append(await _served(last, len(urls)))
        clients.answers += last.answers
        seen = "in flight, waiting, held, free blocks, rows"
        checks.append(Check(name="back at the start", problems=await fleet.wait_idle(), seen=seen))
    done = b"\n".join(map(msgspec.json.encode, faults.done))
    await anyio.Path(fleet.folder / "faults.jsonl").write_bytes(done)
    deaths = Deaths(faults.done)
    checks = [
        answers_check(clients.answers, edges, deaths),
        *checks,
        _deaths_check(fleet, deaths),
        *_usage_checks(fleet, clients, edges, deaths),
        Check(name="no KV files left", problems=left_files(fleet.pids, roots())),
        _logs_check(fleet.folder / "logs"),
    ]
    passed = not any(check.problems for check in checks)
    return table(clients.answers, faults.done, checks), passed


def _processes(fleet: Fleet) -> str:
    return f"{len(list(fleet.children))} processes"


async def _served(clients: Clients, num_edges: int) -> Check:
    """Each edge answers from near each region."""
    answers = [
        await clients.one(
            Asked(
                tenant=TENANTS[0],
                near=near,
                edge=edge,
                chat=False,
                stream=True,
                prompt="at last",
                max_tokens=20,
                stop=None,
                act="read",
                leave_after=1.0,
            )
        )
        for edge in range(num_edges)
        for near in NEAR
    ]
    problems = [it.verdict for it in answers if it.verdict != "ok"]
    return Check(name="served again", problems=problems, seen=f"{len(answers)} requests")


def _deaths_check(fleet: Fleet, deaths: Deaths) -> Check:
    """Nobody died but who was killed; and in the end all stopped as they were told."""
    died = [line for line in fleet.deaths if " died (" in line]
    odd = [line for line in died if "(SIGKILL)" not in line]
    kills = deaths.num(engines=False)
    problems = odd if len(died) <= kills else [*odd, f"{len(died)} deaths, {kills} kills"]
    codes = {child.command.name: child.process.returncode for child in fleet.children}
    problems += [f"{name} stopped with {code}" for name, code in codes.items() if code]
    return Check(name="no death but by a kill", problems=problems, seen=f"{len(died)} deaths")


def _usage_checks(fleet: Fleet, clients: Clients, edges: list[str], deaths: Deaths) -> list[Check]:
    """The ledger against journals and against what clients were told."""
    ledgers, journals = found_files(fleet.usage)
    found = reconcile(ledgers, journals, settle_s=-1.0, apply=True)
    again = reconcile(ledgers, journals, settle_s=-1.0, apply=True)
    left = [line for line in again.lines() if line.startswith(("missing", "over", "twice"))]
    rows = _rows(ledgers[0])
    by_id = {row.request_id: row for row in rows}
    told = f"{again.seen.told:,} tokens told, {again.seen.twice:,} made twice"
    return [
        rows_check(rows, clients.answers),
        told_check(clients.answers, by_id, edges, deaths),
        findings_check(found.findings, clients.answers, by_id, deaths),
        Check(name="reconciled once, all agree", problems=left, seen=told),
    ]


def _rows(path: Path) -> list[LedgerRow]:
    with connected(path, LEDGER) as connection:
        return list(by_request(connection, LEDGER))


def _logs_check(logs: Path) -> Check:
    """No process met a bug of ours."""
    files = sorted(logs.glob("*.log"))
    problems = [
        f"{path.name}: {line[:300]}"
        for path in files
        for line in path.read_text(errors="replace").splitlines()
        if TRACE in line
    ]
    return Check(name="no traceback in a log", problems=problems, seen=f"{len(files)} logs")
