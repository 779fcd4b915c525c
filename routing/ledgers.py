"""`fleet reconcile`: reads the files, compares them, adds what is missing if told to."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from heapq import merge
from operator import attrgetter
from pathlib import Path

from msgspec import Struct

from routing.reconcile import Compared, Finding, Missing, Over, Short, Twice, compare
from routing.rows import by_request, connected, write
from routing.usage import JOURNAL, LEDGER


class NoUsage(Exception):
    """There is nothing to compare."""


class Reconciled(Struct, frozen=True, kw_only=True):
    """What came of it."""

    seen: Compared
    findings: tuple[Finding, ...]
    applied: int  # rows added

    @property
    def settled(self) -> bool:
        """Whether nothing is left that somebody should do something about."""
        missing = sum(isinstance(it, Missing) for it in self.findings)
        wrong = any(isinstance(it, Over | Twice) for it in self.findings)
        return missing == self.applied and not wrong

    def lines(self) -> list[str]:
        """In words: a line a finding, then the sums."""
        seen = self.seen
        said = [_line(it) for it in self.findings]
        said.append(
            f"{seen.requests} requests; {len(self.findings)} differ; {self.applied} rows added; "
            f"{seen.waiting} more ended too recently to be judged"
        )
        said.append(
            f"completion tokens: {seen.told} in ledgers, {seen.made} in journals, "
            f"and {seen.twice} made twice"
        )
        return said


def found_files(usage: Path) -> tuple[list[Path], list[Path]]:
    """Ledgers and journals in the folder where `fleet up` has them."""
    return sorted(usage.glob("ledger*.sqlite")), sorted(usage.glob("journal*.sqlite"))


def reconcile(
    ledgers: Sequence[Path], journals: Sequence[Path], *, settle_s: float, apply: bool
) -> Reconciled:
    """Compare, and with `apply` add the missing rows to the first ledger.

    Raises NoUsage, and what `rows.CANNOT` names.
    """
    if missing := [path for path in (*ledgers, *journals) if not path.is_file()]:
        raise NoUsage(f"no such file: {missing[0]}")
    if not ledgers or not journals:
        raise NoUsage(f"a ledger and a journal are needed: {len(ledgers)} and {len(journals)}")
    with ExitStack() as files:
        told = [files.enter_context(connected(path, LEDGER)) for path in ledgers]
        made = [files.enter_context(connected(path, JOURNAL)) for path in journals]
        seen = Compared()
        findings = tuple(
            compare(
                merge(*(by_request(it, LEDGER) for it in told), key=_by_id),
                merge(*(by_request(it, JOURNAL) for it in made), key=_by_id),
                ended_before=datetime.now(UTC).timestamp() - settle_s,
                known_from=max(map(_known_from, made)),
                account_of=lambda tenant: _account(told, tenant),
                seen=seen,
            )
        )
        applied = 0
        if apply:
            rows = [it.row for it in findings if isinstance(it, Missing)]
            applied = write(told[0], LEDGER, rows)
    return Reconciled(seen=seen, findings=findings, applied=applied)


_by_id = attrgetter("request_id")


def _known_from(journal: sqlite3.Connection) -> float:
    """Since when it is complete. What was dropped ended before all that is left did."""
    first, oldest = journal.execute("SELECT min(rowid), min(ended) FROM journal").fetchone()
    return float("-inf") if first in {None, 1} else float(oldest)


def _account(ledgers: Sequence[sqlite3.Connection], tenant: str) -> str:
    """Whose tenant it is, by any other request of theirs."""
    query = "SELECT account FROM ledger WHERE tenant = ? AND account != '' LIMIT 1"
    for ledger in ledgers:
        if found := ledger.execute(query, (tenant,)).fetchone():
            return str(found[0])
    return ""


def _line(finding: Finding) -> str:
    match finding:
        case Missing(request_id=request_id, row=row):
            account = row.account or "account unknown"
            used = f"{row.prompt_tokens} prompt + {row.completion_tokens} completion tokens"
            where = row.regions or "no region"
            return f"missing  {request_id}  {account}, {where}, {row.outcome}: {used}"
        case Short(request_id=request_id, told=told, known=known):
            return f"short    {request_id}  told {told} tokens, journals know of {known}"
        case Over(request_id=request_id, told=told, made=made):
            return f"over     {request_id}  told {told} tokens, of {made} that were made"
        case Twice(request_id=request_id, rows=rows):
            sources = ", ".join(row.source for row in rows)
            return f"twice    {request_id}  rows in {len(rows)} ledgers, made by {sources}"
