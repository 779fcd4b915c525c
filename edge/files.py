"""Files that clients have uploaded and batches have written: in the store, in parts. SQL, no HTTP.

A file is written a part at a time, each in a transaction of its own, so that a long one keeps
nobody waiting; until it is whole it is not there for anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from edge.store import Db, Store
from edge.store_schema import drop_parts
from routing.errors import Code, Failure

PART_BYTES = 1_000_000
_PRUNED_PARTS = 20  # in one transaction: others wait for it
UNFINISHED_S = 3600.0  # after which a file whose writer has gone is dropped


class File(Struct, frozen=True, kw_only=True):
    """A row, in the order of its columns."""

    id: str
    account: str
    name: str
    purpose: str
    num_bytes: int  # -1 until it is whole
    created: float
    forget: float


_COLUMNS = ", ".join(File.__struct_fields__)


class FileWriter:
    """Writes `file`, whose id nobody else writes unless with the same content."""

    def __init__(self, store: Store, file: File) -> None:
        self._store = store
        self._file = file
        self._unwritten = bytearray()
        self._num_parts = 0
        self.num_bytes = 0

    async def write(self, data: bytes) -> None:
        self._unwritten += data
        self.num_bytes += len(data)
        while len(self._unwritten) >= PART_BYTES:
            await self._write_part(bytes(self._unwritten[:PART_BYTES]))
            del self._unwritten[:PART_BYTES]

    async def finish(self, most_of_account: int | None = None) -> File:
        """Have it there; as it is known from now on. Failure(TOO_LARGE), and nothing is left of it,
        where its account would have more bytes than that."""
        if self._unwritten or not self._num_parts:
            await self._write_part(bytes(self._unwritten))
        file = self._file
        # Of a writer that has gone there may be more than this one had to say.
        await self._store.write(partial(_cut, file=file.id, num_parts=self._num_parts))
        finish = partial(_finish, file=file, size=self.num_bytes, most=most_of_account)
        if (has := await self._store.write(finish)) is not None:
            says = f"this account has {has} bytes of files, of {most_of_account}: delete some"
            raise Failure(Code.TOO_LARGE, says)
        return File(
            id=file.id,
            account=file.account,
            name=file.name,
            purpose=file.purpose,
            num_bytes=self.num_bytes,
            created=file.created,
            forget=file.forget,
        )

    async def _write_part(self, content: bytes) -> None:
        place = self._num_parts
        await self._store.write(partial(_write_part, file=self._file, place=place, content=content))
        self._num_parts += 1


def find(db: Db, account: str, file: str) -> File | None:
    query = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND account = ? AND num_bytes >= 0"
    return next(iter(_files(db, query, (file, account))), None)


def listed(
    db: Db, account: str, *, purpose: str | None, after: str | None, limit: int
) -> list[File]:
    """Newest first; after the file of this id, if it is one of these."""
    where, values = "account = ? AND num_bytes >= 0", [account]
    if purpose is not None:
        where += " AND purpose = ?"
        values.append(purpose)
    if after is not None:
        since = "SELECT created FROM files WHERE id = ? AND account = ?"
        where += f" AND (created < ({since}) OR (created = ({since}) AND id < ?))"
        values += [after, account, after, account, after]
    query = f"SELECT {_COLUMNS} FROM files WHERE {where} ORDER BY created DESC, id DESC"
    return _files(db, f"{query} LIMIT {limit:d}", values)


def num_bytes(db: Db, account: str) -> int:
    """Of all files that the account has."""
    query = "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE account = ? AND num_bytes >= 0"
    return int(db.execute(query, (account,)).fetchone()[0])


def part(db: Db, file: str, place: int) -> bytes | None:
    query = "SELECT content FROM file_parts WHERE file = ? AND place = ?"
    row = db.execute(query, (file, place)).fetchone()
    return None if row is None else row[0]


def content(db: Db, file: str) -> bytes:
    query = "SELECT content FROM file_parts WHERE file = ? ORDER BY place"
    return b"".join(row[0] for row in db.execute(query, (file,)))


def drop(db: Db, account: str, file: str) -> bool:
    """Whether it was there."""
    there = db.execute("DELETE FROM files WHERE id = ? AND account = ?", (file, account)).rowcount
    if there:
        db.execute("DELETE FROM file_parts WHERE file = ?", (file,))
    return bool(there)


def prune(db: Db, now: float, limit: int) -> int:
    """Drop files whose time has come, a few parts at once, for those are large; how many rows, or
    `limit` as long as there may be more."""
    # Nobody finds them any more, though their parts may take a while to go.
    db.execute("UPDATE files SET num_bytes = -1 WHERE forget < ? AND num_bytes >= 0", (now,))
    dropping = drop_parts("file_parts", "file", "files")
    num_parts = db.execute(dropping, (now, _PRUNED_PARTS)).rowcount
    if num_parts == _PRUNED_PARTS:
        return limit
    query = "SELECT id FROM files WHERE forget < ? LIMIT ?"
    gone = db.execute(query, (now, limit)).fetchall()
    db.executemany("DELETE FROM files WHERE id = ?", gone)
    return len(gone)


def _write_part(db: Db, file: File, place: int, content: bytes) -> None:
    if not place:
        db.execute(
            f"INSERT INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, -1, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET created = excluded.created, forget = excluded.forget"
            " WHERE files.num_bytes < 0",
            (file.id, file.account, file.name, file.purpose, file.created,
             file.created + UNFINISHED_S),
        )  # fmt: skip
    db.execute(
        "INSERT INTO file_parts (file, place, content) VALUES (?, ?, ?)"
        " ON CONFLICT (file, place) DO UPDATE SET content = excluded.content",
        (file.id, place, content),
    )


def _cut(db: Db, file: str, num_parts: int) -> None:
    db.execute("DELETE FROM file_parts WHERE file = ? AND place >= ?", (file, num_parts))


def _finish(db: Db, file: File, size: int, most: int | None) -> int | None:
    """None; or what the account has in other files, which leave no room for this one."""
    has = num_bytes(db, file.account)
    if most is not None and has + size > most:
        drop(db, file.account, file.id)
        return has
    query = "UPDATE files SET num_bytes = ?, forget = ? WHERE id = ?"
    db.execute(query, (size, file.forget, file.id))
    return None


def _files(db: Db, query: str, values: Sequence[Any]) -> list[File]:
    rows = db.execute(query, values)
    return [File(**dict(zip(File.__struct_fields__, row, strict=True))) for row in rows]
