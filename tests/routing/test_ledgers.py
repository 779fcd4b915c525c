"""`fleet reconcile`: the files it finds, what it says of them, and what it adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from origin_gpu.journal import prune
from routing.ledgers import NoUsage, found_files, reconcile
from routing.reconcile import Short, Twice
from routing.rows import WrongFile, by_request, connected, write
from routing.usage import JOURNAL, LEDGER, JournalRow, LedgerRow
from tests.routing.test_rows import ledger_rows, made, told


def files(folder: Path, ledger: list[LedgerRow], journals: list[JournalRow]) -> Path:
    usage = folder / "state" / "usage"
    with connected(usage / "ledger.sqlite", LEDGER) as connection:
        write(connection, LEDGER, ledger)
    for front in ("weur-front", "enam-front"):
        with connected(usage / f"journal-{front}.sqlite", JOURNAL) as connection:
            write(connection, JOURNAL, [row for row in journals if row.front == front])
    return usage


def fleet(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "routing", "reconcile", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        timeout=60,
        check=False,
    )


def test_as_an_operator_types_it(tmp_path: Path) -> None:
    """Listed, then added, then agreed with, as often as it is asked."""
    parts = [
        made("b", new_tokens=2, outcome="aborted"),
        made("b", front="enam-front", region="enam", first_token=2, new_tokens=7, started=10.5),
    ]
    usage = files(tmp_path, [told("a")], [made("a"), *parts])
    listed = fleet(tmp_path)
    assert listed.returncode == 1, listed.stderr
    row, sums, tokens = listed.stdout.splitlines()
    assert row == "missing  b  acme, weur,enam, length: 2 prompt + 9 completion tokens"
    assert sums.startswith("2 requests; 1 differ; 0 rows added")
    assert tokens == "completion tokens: 5 in ledgers, 5 in journals, and 0 made twice"
    added = fleet(tmp_path, "--apply")
    assert added.returncode == 0
    assert "1 rows added" in added.stdout
    again = fleet(tmp_path, "--apply")
    assert again.returncode == 0
    assert "2 requests; 0 differ; 0 rows added" in again.stdout
    assert "completion tokens: 14 in ledgers, 14 in journals" in again.stdout
    assert [(r.request_id, r.source) for r in ledger_rows(usage / "ledger.sqlite")] == [
        ("a", "edge"),
        ("b", "journal"),
    ]


def test_without_files_it_says_so(tmp_path: Path) -> None:
    done = fleet(tmp_path)
    assert done.returncode == 1
    assert "a ledger and a journal are needed" in done.stderr
    with pytest.raises(NoUsage, match="no such file"):
        reconcile([tmp_path / "no"], [], settle_s=0, apply=False)


def test_new_requests_are_not_touched(tmp_path: Path) -> None:
    now = datetime.now(UTC).timestamp()
    usage = files(tmp_path, [told("a")], [made("a"), made("b", started=now, ended=now)])
    ledgers, journals = found_files(usage)
    done = reconcile(ledgers, journals, settle_s=60, apply=True)
    assert (done.applied, done.seen.waiting, done.findings) == (0, 1, ())
    done = reconcile(ledgers, journals, settle_s=-1, apply=True)
    assert done.applied == 1


def test_two_edges_with_a_ledger_each(tmp_path: Path) -> None:
    one = files(tmp_path / "one", [told("a")], [made("a"), made("b")])
    two = files(tmp_path / "two", [told("b")], [])
    ledgers = [one / "ledger.sqlite", two / "ledger.sqlite"]
    assert reconcile(ledgers, found_files(one)[1], settle_s=0, apply=False).findings == ()
    with connected(two / "ledger.sqlite", LEDGER) as connection:
        assert [row.request_id for row in by_request(connection, LEDGER)] == ["b"]


def test_a_row_added_to_one_ledger_that_its_edge_writes_to_another(tmp_path: Path) -> None:
    """Nothing but a settling time that was too short does that; it is told, and asks for a hand."""
    one = files(tmp_path / "one", [told("a")], [made("a"), made("b")])
    two = files(tmp_path / "two", [], [])
    ledgers = [one / "ledger.sqlite", two / "ledger.sqlite"]
    journals = found_files(one)[1]
    assert reconcile(ledgers, journals, settle_s=0, apply=True).settled
    with connected(two / "ledger.sqlite", LEDGER) as connection:
        write(connection, LEDGER, [told("b")])
    done = reconcile(ledgers, journals, settle_s=0, apply=True)
    assert not done.settled
    [found] = done.findings
    assert isinstance(found, Twice)
    assert [row.source for row in found.rows] == ["journal", "edge"]
    assert done.lines()[0] == "twice    b  rows in 2 ledgers, made by journal, edge"


def test_files_in_each_others_place_are_refused(tmp_path: Path) -> None:
    usage = files(tmp_path, [told("a")], [made("a")])
    [ledger], [journal, _] = found_files(usage)
    with pytest.raises(WrongFile, match="no ledger, but tables journal"):
        reconcile([journal], [ledger], settle_s=0, apply=True)
    assert reconcile([ledger], [journal], settle_s=0, apply=False).findings == (
        Short(request_id="a", told=5, known=0),
    )  # the other front's journal has it


@pytest.mark.parametrize("most", [1, 2, 100])
def test_what_a_journal_dropped_is_not_missed(tmp_path: Path, most: int) -> None:
    """By age or by number, down to its last row, which began long before it ended."""
    usage = tmp_path / "usage"
    rows = [made(str(n), front="f", started=10.0 * n, ended=10.0 * n + 5) for n in range(1, 5)]
    rows.append(made("5", front="f", started=11.0, ended=47.0))
    with connected(usage / "journal-f.sqlite", JOURNAL) as connection:
        write(connection, JOURNAL, rows)
        assert prune(connection, before=46.0, most=most) == 4
        assert prune(connection, before=1000.0, most=most) == 0
        assert [row.request_id for row in by_request(connection, JOURNAL)] == ["5"]
    with connected(usage / "ledger.sqlite", LEDGER) as connection:
        alike = [told(row.request_id, started=row.started, ended=row.ended) for row in rows]
        write(connection, LEDGER, [*alike, told("6", started=48.0, ended=49.0)])
    done = reconcile(*found_files(usage), settle_s=0, apply=False)
    assert done.findings == (Short(request_id="6", told=5, known=0),)


def test_for_scripts(tmp_path: Path) -> None:
    files(tmp_path, [told("a")], [made("a"), made("b")])
    done = fleet(tmp_path, "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert said["seen"] == {"requests": 2, "waiting": 0, "told": 5, "made": 5, "twice": 0}
    assert [(it["type"], it["request_id"]) for it in said["findings"]] == [("missing", "b")]
    assert said["findings"][0]["row"]["source"] == "journal"
    assert said["applied"] == 0
