"""Rows in SQLite files: none twice, none lost, whoever else writes and however a process ends."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routing import rows as rows_module
from routing.rows import RowWriter, WrongFile, by_request, connected, write
from routing.usage import JOURNAL, LEDGER, JournalRow, LedgerRow

PATIENCE_S = 60.0


def told(request_id: str, **other: Any) -> LedgerRow:
    fields: dict[str, Any] = {
        "request_id": request_id,
        "account": "acme",
        "key_id": "k",
        "tenant": "t",
        "model": "m",
        "regions": "weur",
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "cached_tokens": 0,
        "outcome": "ok",
        "whole": True,
        "started": 10.0,
        "ended": 11.0,
    }
    return LedgerRow(**(fields | other))


def made(request_id: str, **other: Any) -> JournalRow:
    fields: dict[str, Any] = {
        "request_id": request_id,
        "region": "weur",
        "front": "weur-front",
        "tenant": "t",
        "model": "m",
        "prompt_tokens": 2,
        "first_token": 0,
        "new_tokens": 5,
        "cached_tokens": 0,
        "outcome": "length",
        "started": 10.0,
        "ended": 11.0,
    }
    return JournalRow(**(fields | other))


def ledger_rows(path: Path) -> list[LedgerRow]:
    with connected(path, LEDGER) as connection:
        return list(by_request(connection, LEDGER))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_written_is_read_in_the_order_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "made" / "ledger.sqlite"
    writer = RowWriter(path, LEDGER)
    written = [told("b", whole=False), told("a", started=1.25, outcome="hung_up"), told("c")]
    for row in written:
        writer.put(row)
    writer.close()
    assert ledger_rows(path) == sorted(written, key=lambda row: row.request_id)
    assert path.stat().st_mode & 0o777 == 0o600
    assert writer.num_pending == writer.num_lost == 0


def test_the_first_row_of_a_request_stands(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with connected(path, LEDGER) as connection:
        assert write(connection, LEDGER, [told("a"), told("a", completion_tokens=99)]) == 1
        assert write(connection, LEDGER, [told("a", account="thief", completion_tokens=1)]) == 0
    assert ledger_rows(path) == [told("a")]


def test_an_edges_own_row_goes_before_one_made_of_journals(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    guessed = told("a", completion_tokens=4, source="journal")
    with connected(path, LEDGER) as connection:
        assert write(connection, LEDGER, [guessed]) == 1
        assert write(connection, LEDGER, [guessed]) == 0
        assert write(connection, LEDGER, [told("a")]) == 1
        assert write(connection, LEDGER, [guessed]) == 0
    assert ledger_rows(path) == [told("a")]


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """From its making on; every third id is written by both."""
    path = tmp_path / "ledger.sqlite"
    program = (
        "import sys; from pathlib import Path\n"
        "from routing.rows import RowWriter; from routing.usage import LEDGER\n"
        "from tests.routing.test_rows import told\n"
        "writer = RowWriter(Path(sys.argv[1]), LEDGER)\n"
        "for n in range(600):\n"
        "    writer.put(told(f'{n}' if n % 3 == 0 else f'{n} of {sys.argv[2]}'))\n"
        "writer.close()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "two", "three")]
    assert [process.wait(PATIENCE_S) for process in writers] == [0, 0, 0]
    ids = {row.request_id for row in ledger_rows(path)}
    shared = {f"{n}" for n in range(0, 600, 3)}
    own = {f"{n} of {name}" for n in range(600) if n % 3 for name in ("one", "two", "three")}
    assert ids == shared | own


def test_what_was_written_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from routing.rows import RowWriter; from routing.usage import LEDGER\n"
        "from tests.routing.test_rows import told\n"
        "writer = RowWriter(Path(sys.argv[1]), LEDGER)\n"
        "for n in range(10**9):\n"
        "    writer.put(told(str(n)))\n"
        "    while writer.num_pending: time.sleep(0)\n"
        "    print(n, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(50):
            last = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    ids = {int(row.request_id) for row in ledger_rows(path)}
    assert ids >= set(range(int(last) + 1))


def test_a_file_that_is_locked_for_a_time_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rows_module, "BUSY_S", 0.05)
    monkeypatch.setattr(rows_module, "RETRY_S", 0.05)
    path = tmp_path / "ledger.sqlite"
    writer = RowWriter(path, LEDGER)
    with connected(path, LEDGER) as other:
        other.execute("BEGIN IMMEDIATE")
        for n in range(5):
            writer.put(told(str(n)))
        until(lambda: "usage was not written" in caplog.text)
        assert writer.num_pending == 5
        other.execute("COMMIT")
        until(lambda: not writer.num_pending)
    writer.close()
    assert [row.request_id for row in ledger_rows(path)] == list("01234")


def test_what_cannot_be_written_for_too_long_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rows_module, "BUSY_S", 0.05)
    monkeypatch.setattr(rows_module, "RETRY_S", 0.05)
    monkeypatch.setattr(rows_module, "MOST_PENDING", 3)
    path = tmp_path / "ledger.sqlite"
    writer = RowWriter(path, LEDGER)
    with connected(path, LEDGER) as other:
        other.execute("BEGIN IMMEDIATE")
        writer.put(told("0"))
        until(lambda: "usage was not written" in caplog.text)
        for n in range(1, 9):
            writer.put(told(str(n)))
        assert writer.num_pending + writer.num_lost == 9
        assert writer.num_lost >= 5
        other.execute("COMMIT")
        until(lambda: not writer.num_pending)
    writer.close()
    ids = [row.request_id for row in ledger_rows(path)]
    assert ids[-3:] == ["6", "7", "8"]  # the oldest were given up
    assert len(ids) + writer.num_lost == 9


def test_a_file_that_is_locked_at_the_start_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another edge was stopped in the middle of a write."""
    monkeypatch.setattr(rows_module, "BUSY_S", 0.05)
    monkeypatch.setattr(rows_module, "RETRY_S", 0.05)
    path = tmp_path / "ledger.sqlite"
    with connected(path, LEDGER) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = RowWriter(path, LEDGER)
        writer.put(told("a"))
        other.execute("COMMIT")
        until(lambda: not writer.num_pending)
    writer.close()
    assert ledger_rows(path) == [told("a")]


def test_a_row_that_comes_after_the_end_is_written_at_once(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "ledger.sqlite", LEDGER)
    writer.close()
    writer.put(told("late"))
    assert [row.request_id for row in ledger_rows(tmp_path / "ledger.sqlite")] == ["late"]


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and longer than its header of a hundred bytes is" * 9)
    with pytest.raises(WrongFile, match="not a database"):
        RowWriter(text, LEDGER)
    assert text.read_text().startswith("not a database")
    foreign = tmp_path / "bookmarks.sqlite"
    with sqlite3.connect(foreign) as theirs:
        theirs.execute("CREATE TABLE bookmarks (url TEXT)")
    theirs.close()
    with pytest.raises(WrongFile, match="no ledger, but tables bookmarks"):
        RowWriter(foreign, LEDGER)
    with sqlite3.connect(foreign) as theirs:
        assert theirs.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
        assert theirs.execute("PRAGMA user_version").fetchone() == (0,)
    theirs.close()
    with connected(tmp_path / "journal.sqlite", JOURNAL):
        pass
    with pytest.raises(WrongFile, match="no ledger, but tables journal"):
        RowWriter(tmp_path / "journal.sqlite", LEDGER)
    later = tmp_path / "later.sqlite"
    with connected(later, LEDGER) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(WrongFile, match="version 2, where 1"):
        RowWriter(later, LEDGER)


def test_it_is_tended_at_first_and_then_by_the_clock(tmp_path: Path) -> None:
    """Also while there are no rows."""
    tended: list[int] = []

    def tend(connection: sqlite3.Connection) -> None:
        tended.append(connection.execute("SELECT count(*) FROM journal").fetchone()[0])

    writer = RowWriter(tmp_path / "journal.sqlite", JOURNAL, tend=tend, tend_s=0.02)
    assert tended[0] == 0
    writer.put(made("a"))
    until(lambda: 1 in tended)
    seen = len(tended)
    until(lambda: len(tended) > seen + 2)
    writer.close()
