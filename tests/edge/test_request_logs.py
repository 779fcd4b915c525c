"""Rows of requests that wait to be written: how many there are, and how large."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge import request_logs
from edge.metrics import Record
from edge.request_logs import RequestLogs
from edge.store import Db, Store, StoreAway


def record(name: str) -> Record:
    body = b"x" * 100_000
    made = Record(request_id=name, started=0.0, account="acme", logged=True)
    made.bodies = body, bytearray(body)
    return made


def rows(db: Db) -> list[tuple[str, int]]:
    query = "SELECT id, coalesce(length(request), 0) + coalesce(length(response), 0) FROM logs"
    return db.execute(f"{query} ORDER BY id").fetchall()


async def test_while_the_store_is_away_the_oldest_go_and_few_have_bodies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_logs, "MOST_WITH_BODIES", 3)
    monkeypatch.setattr(request_logs, "MOST_PENDING", 6)
    store, logs = Store(tmp_path / "store.sqlite"), RequestLogs(lambda: 1000.0)
    for n in range(5):
        logs.note(record(f"{n}"), 1.0)

    async def away_while_more_come(work: object) -> None:
        for n in range(5, 8):
            logs.note(record(f"{n}"), 1.0)
        raise StoreAway

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", away_while_more_come)
        await logs.close(store)
    await logs.close(store)
    kept = await store.read(rows)
    assert [name for name, _ in kept] == ["2", "3", "4", "5", "6", "7"]
    with_bodies = [name for name, num_bytes in kept if num_bytes]
    assert with_bodies == ["2", "5", "6", "7"]  # of those taken to be written, and of those after
    store.close()
