"""Files in the store, part by part: what is dropped, and what is written anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edge import files
from edge.files import PART_BYTES, File, FileWriter
from edge.store import Db, Store


def file(name: str, created: float = 0.0, forget: float = 1e12) -> File:
    return File(
        id=name, account="acme", name=name, purpose="batch", num_bytes=-1, created=created,
        forget=forget,
    )  # fmt: skip


def num_parts(db: Db) -> int:
    return int(db.execute("SELECT count(*) FROM file_parts").fetchone()[0])


async def written(store: Store, made: File, parts: int) -> None:
    writer = FileWriter(store, made)
    for _ in range(parts):
        await writer.write(b"x" * PART_BYTES)
    await writer.finish()


async def test_few_parts_are_dropped_at_once(tmp_path: Path) -> None:
    """A large file goes by and by, but for its account it is gone."""
    store = Store(tmp_path / "store.sqlite")
    await written(store, file("large", forget=5.0), 45)
    await written(store, file("kept"), 1)
    left, gone = 46, 7
    while gone >= 7:
        gone = await store.write(partial(files.prune, now=6.0, limit=7))
        assert await store.read(partial(files.find, account="acme", file="large")) is None
        assert left - (left := await store.read(num_parts)) <= 20
    assert left == 1
    listed = partial(files.listed, account="acme", purpose=None, after=None, limit=9)
    assert [it.id for it in await store.read(listed)] == ["kept"]
    assert await store.write(partial(files.prune, now=6.0, limit=7)) == 0
    store.close()


async def test_who_writes_a_file_again_after_another_has_died_has_it_whole(tmp_path: Path) -> None:
    """As of a batch whose edge was killed at its outputs, hours ago: nothing is left of those."""
    store = Store(tmp_path / "store.sqlite")
    dead = FileWriter(store, file("output", created=0.0))
    await dead.write(b"old" * PART_BYTES)
    writer = FileWriter(store, file("output", created=10_000.0))
    await writer.write(b"n" * PART_BYTES)
    assert await store.write(partial(files.prune, now=10_000.0, limit=9)) == 0
    await writer.write(b"ew")
    made = await writer.finish()
    assert await store.read(partial(files.find, account="acme", file="output")) == made
    content = partial(files.content, file="output")
    assert await store.read(content) == b"n" * PART_BYTES + b"ew"
    late = FileWriter(store, file("output"))  # has lost its lease, and does not know yet
    await late.write(b"n" * PART_BYTES)
    assert await store.read(partial(files.find, account="acme", file="output")) == made
    assert await store.read(content) == b"n" * PART_BYTES + b"ew"
    store.close()
