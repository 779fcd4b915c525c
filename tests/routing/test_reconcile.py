"""Ledgers against journals, worked out by hand; and as an operator types it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from routing.ledgers import NoUsage, found_files, reconcile
from routing.reconcile import Compared, Finding, Missing, Over, Short, compare, num_made
from routing.rows import by_request, connected, write
from routing.usage import JOURNAL, LEDGER, JournalRow, LedgerRow
from tests.routing.test_rows import ledger_rows, made, told


def findings(
    ledger: list[LedgerRow], journals: list[JournalRow], *, known_from: float = 0.0
) -> list[Finding]:
    return list(
        compare(
            sorted(ledger, key=lambda row: row.request_id),
            sorted(journals, key=lambda row: row.request_id),
            ended_before=100.0,
            known_from=known_from,
            account_of={"t": "acme"}.get,  # type: ignore[arg-type]
            seen=Compared(),
        )
    )


def test_what_agrees_is_no_finding() -> None:
    assert not findings([told("a"), told("b")], [made("b"), made("a")])


def test_a_request_over_two_regions_is_one_row_and_its_parts() -> None:
    parts = [
        made("a", new_tokens=3, outcome="aborted"),
        made("a", region="enam", first_token=3, new_tokens=2, started=10.5),
    ]
    assert not findings([told("a", regions="weur,enam")], parts)


def test_tokens_made_twice_count_once() -> None:
    """The first region had made two more than were heard."""
    parts = [made("a", new_tokens=4, outcome="aborted"), made("a", first_token=2, new_tokens=3)]
    assert num_made(parts) == 5
    assert not findings([told("a")], parts)


def test_who_hung_up_was_told_at_most_what_was_made() -> None:
    left = told("a", outcome="hung_up", whole=False, completion_tokens=3)
    assert not findings([left], [made("a", new_tokens=5, outcome="aborted")])
    assert findings([left], [made("a", new_tokens=2, outcome="aborted")]) == [
        Short(request_id="a", told=3, known=2)
    ]


def test_a_ledger_that_has_less_of_a_whole_answer() -> None:
    assert findings([told("a", completion_tokens=4)], [made("a")]) == [
        Over(request_id="a", told=4, made=5)
    ]


def test_a_killed_front_leaves_a_gap() -> None:
    """Its part is in no journal; the next one's begins behind it."""
    assert findings([told("a")], [made("a", first_token=3, new_tokens=2)]) == [
        Short(request_id="a", told=5, known=2)
    ]
    assert findings([told("a")], []) == [Short(request_id="a", told=5, known=0)]
    assert not findings([told("a", completion_tokens=0, regions="")], [])  # none could be asked


def test_what_journals_have_dropped_is_not_missed() -> None:
    old, new = told("a", started=9.0), told("b", started=30.0)
    assert findings([old, new], [], known_from=20.0) == [Short(request_id="b", told=5, known=0)]


def test_a_missing_row_is_made_of_all_its_parts() -> None:
    parts = [
        made("a", new_tokens=3, outcome="aborted", cached_tokens=2, ended=12.0),
        made("a", region="enam", first_token=3, new_tokens=4, started=12.5, ended=14.0),
    ]
    [missing] = findings([told("b")], [*parts, made("b")])
    assert isinstance(missing, Missing)
    assert missing.row == told(
        "a",
        key_id="",
        regions="weur,enam",
        completion_tokens=7,
        cached_tokens=2,
        outcome="length",
        ended=14.0,
        source="journal",
    )


def test_a_request_that_has_just_ended_is_not_missed_yet() -> None:
    seen = Compared()
    rows = [made("a", ended=99.5)]
    found = compare(
        [], rows, ended_before=99.0, known_from=0, account_of=lambda tenant: "", seen=seen
    )
    assert not list(found)
    assert seen.waiting == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_over_regions_is_recognised(seed: int) -> None:
    """However a request is broken off and resumed, with whatever was made and not heard: its row
    agrees; without it, one is made that has every token."""
    rng = random.Random(seed)
    ledger, journals = [], []
    for number in range(30):
        request_id, total, heard = f"{number:02}", rng.randint(0, 40), 0
        while heard < total and rng.random() < 0.6:
            new = rng.randint(0, total - heard)
            unheard = rng.randint(0, min(3, total - heard - new))
            journals.append(
                made(request_id, first_token=heard, new_tokens=new + unheard, outcome="aborted")
            )
            heard += new
        last = total - heard
        journals.append(made(request_id, first_token=heard, new_tokens=last, started=20.0))
        ledger.append(told(request_id, completion_tokens=total))
    rng.shuffle(journals)
    assert not findings(ledger, journals)
    lost = [row for row in ledger if rng.random() < 0.3]
    found = findings([row for row in ledger if row not in lost], journals)
    rebuilt = {it.request_id: it.row.completion_tokens for it in found if isinstance(it, Missing)}
    assert rebuilt == {row.request_id: row.completion_tokens for row in lost}
    assert len(found) == len(lost)


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
