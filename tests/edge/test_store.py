"""The store: one file, several processes, and what becomes of calls when it cannot be used."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import anyio
import pytest

from edge import store as store_module
from edge.store import BUSY_S, CALL_S, Db, Store, StoreAway
from routing.errors import Code, Failure
from routing.rows import WrongFile

ROOT = Path(__file__).parents[2]
WRITER = ROOT / "tests" / "fakes" / "store_writer.py"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"


def process(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), str(path), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def put(db: Db, name: str = "a") -> None:
    db.execute("INSERT INTO secrets (account, secret) VALUES (?, x'00')", (name,))


def count(db: Db) -> int:
    return int(db.execute("SELECT count(*) FROM secrets").fetchone()[0])


async def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    await store.write(
        lambda db: db.execute("INSERT INTO secrets (account, secret) VALUES ('counter', '0')")
    )
    writers = [process(path, "hammer", "150", f"w{n}") for n in range(3)]
    assert [await anyio.to_thread.run_sync(it.wait, 60) for it in writers] == [0, 0, 0]
    for it in writers:
        it.communicate()
    value = await store.read(
        lambda db: db.execute("SELECT secret FROM secrets WHERE account = 'counter'").fetchone()[0]
    )
    assert int(value) == 450
    assert await store.read(count) == 451
    store.close()


async def test_what_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    await store.write(
        lambda db: db.execute("INSERT INTO secrets (account, secret) VALUES ('counter', '0')")
    )
    writer = process(path, "hammer", "100000", "w")
    with anyio.fail_after(20):
        while await store.read(count) < 20:
            await anyio.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    rows = await store.read(count)
    value = await store.read(
        lambda db: db.execute("SELECT secret FROM secrets WHERE account = 'counter'").fetchone()[0]
    )
    assert int(value) == rows - 1 >= 19  # both parts of each transaction, or none
    await store.write(put)  # and nobody holds a lock
    store.close()


async def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")

    def half(db: Db) -> None:
        put(db)
        raise Failure(Code.NOT_FOUND, "after all")

    with pytest.raises(Failure, match="after all"):
        await store.write(half)
    assert await store.read(count) == 0
    store.close()


@pytest.mark.slow
async def test_a_lock_that_is_not_given_back_ends_a_call_in_time(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    holder = process(path, "lock")
    assert holder.stdout is not None
    assert await anyio.to_thread.run_sync(holder.stdout.readline) == "locked\n"
    started = time.monotonic()
    with pytest.raises(StoreAway) as told:
        await store.write(put)
    assert BUSY_S * 0.9 < time.monotonic() - started < CALL_S
    assert told.value.code.meaning.status == 503
    assert told.value.retry_after_s
    started = time.monotonic()
    with pytest.raises(StoreAway):  # for a moment nobody tries
        await store.read(count)
    assert time.monotonic() - started < 0.5
    Store(path).close()  # another edge may start meanwhile
    holder.kill()
    holder.communicate()
    await anyio.sleep(store_module.AWAY_S)
    await store.write(put)
    assert await store.read(count) == 1
    store.close()


async def test_a_statement_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CALL_S", 0.3)
    store = Store(tmp_path / "store.sqlite")
    with pytest.raises(StoreAway):
        await store.read(lambda db: db.execute(ENDLESS).fetchone())
    store.close()


async def test_long_looks_keep_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and though they take too long."""
    store, gate, told = Store(tmp_path / "store.sqlite"), threading.Event(), list[Code]()

    async def look() -> None:
        try:
            await store.look_through("acme", lambda db: gate.wait(10))
        except Failure as failure:
            told.append(failure.code)

    async with anyio.create_task_group() as tasks:
        for _ in range(3 * store_module.THREADS):
            tasks.start_soon(look)
        await anyio.wait_all_tasks_blocked()
        await store.write(put)
        with anyio.fail_after(5):
            assert await store.look_through("globex", count) == 1
        gate.set()
    assert told == []
    monkeypatch.setattr(store_module, "CALL_S", 0.3)
    with pytest.raises(Failure) as caught:
        await store.look_through("acme", lambda db: db.execute(ENDLESS).fetchone())
    assert caught.value.code is Code.TIMEOUT
    assert await store.read(count) == 1
    store.close()


async def test_calls_are_counted_by_how_they_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store.sqlite")
    await store.write(put)

    def refuse(db: Db) -> None:
        raise Failure(Code.NOT_FOUND, "not there")

    with pytest.raises(Failure, match="not there"):
        await store.read(refuse)
    with anyio.move_on_after(0.05):
        await store.read(lambda db: time.sleep(0.5))
    monkeypatch.setattr(store_module, "CALL_S", 0.05)
    with pytest.raises(StoreAway):
        await store.read(lambda db: time.sleep(0.5))
    assert store.calls == {"ok": 1, "refused": 1, "left": 1, "away": 1}
    assert store.busy_s > 0
    store.close()


async def test_a_file_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    await store.write(put)
    for file in tmp_path.iterdir():
        file.unlink()
    await store.write(put)
    assert await store.read(count) == 1
    other = Store(path)
    assert await other.read(count) == 1  # all who come now see the same
    store.close()
    other.close()


def corrupt(path: Path) -> None:
    path.write_bytes(b"not a database, and long enough to be one" * 100)


def of_others(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (a)")
    db.commit()
    db.close()


def of_later(path: Path) -> None:
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


@pytest.mark.parametrize("spoil", [corrupt, of_others, of_later])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "store.sqlite"
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(WrongFile, match=str(path)):
        Store(path)
    assert path.read_bytes() == before


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WrongFile, match=str(tmp_path)):
        Store(tmp_path)


COMES_AND_GOES = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("SELECT count(*) FROM secrets").fetchone()
db.close()
"""


async def test_opening_takes_nobodys_locks(tmp_path: Path) -> None:
    """With any descriptor of a file that a process closes, all of its locks on it go; then others
    who leave believe that they are the last, and take the log of what was written with them."""
    path = tmp_path / "store.sqlite"
    store = Store(path)
    await store.write(put)
    more = Store(path)  # another connection of this process, as another thread makes it
    log = path.with_name("store.sqlite-wal").stat().st_ino
    command = [sys.executable, "-c", COMES_AND_GOES, str(path)]
    done = await anyio.run_process(command)
    assert done.returncode == 0
    assert path.with_name("store.sqlite-wal").stat().st_ino == log
    await store.write(lambda db: put(db, "b"))
    other = Store(path)
    assert await other.read(count) == await more.read(count) == 2
    for it in (store, more, other):
        it.close()


AS_NOBODY = """
import os, sys
from pathlib import Path
from edge.store import Store
if os.geteuid() == 0:
    os.setuid(65534)
Store(Path(sys.argv[1]))
"""


def test_a_file_that_cannot_be_written_is_refused_by_name() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "store.sqlite"
        path.touch()
        path.chmod(0o444)
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", AS_NOBODY, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"PermissionError: [Errno 13] Permission denied: {str(path)!r}" in done.stderr
