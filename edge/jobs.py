"""Jobs in the store: many requests asked at once, answered when there is room. SQL, and no more.

Every function is a part of one transaction. One process works on a job at a time, by a lease, which
it renews; once that is over, another may go on. An answer is written once, whoever made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from edge.keys import Grant
from edge.store import Db
from edge.store_schema import drop_parts

Kind = Literal["queue", "batch"]
# validating: only batches, whose requests are still in a file. What is after `running` is for good.
Status = Literal[
    "validating", "queued", "running", "cancelling", "completed", "failed", "cancelled", "expired"
]


class Extra(Struct, kw_only=True, omit_defaults=True):
    """What only a batch has, and what its key was good for when any job was asked for."""

    grant: Grant = Grant()
    endpoint: str = ""
    input_file: str = ""
    window: str = ""
    metadata: dict[str, str] | None = None
    errors: list[dict[str, Any]] = []
    output_file: str | None = None
    error_file: str | None = None
    cancelling_at: float | None = None


class Job(Struct, frozen=True, kw_only=True):
    """A row, in the order of its columns."""

    id: str
    account: str
    key_id: str
    kind: Kind
    route: str  # of its requests, below the account's /ai/
    model: str  # empty where each request names its own
    status: Status
    created: float
    started: float | None = None
    ended: float | None = None
    deadline: float  # what is not answered by then never is
    forget: float  # when the row goes
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    webhook: str = ""
    extra: bytes = b"{}"
    holder: str = ""
    lease_until: float = 0.0

    @property
    def more(self) -> Extra:
        return msgspec.json.decode(self.extra, type=Extra)


class Item(Struct, frozen=True, kw_only=True):
    """One request of a job, and its answer once there is one."""

    place: int
    name: str | None  # what its sender calls it
    body: bytes
    status: int | None = None  # HTTP
    answer: bytes | None = None  # JSON, as its route gave it
    request_id: str | None = None


_COLUMNS = ", ".join(Job.__struct_fields__)
_ITEM_COLUMNS = ", ".join(Item.__struct_fields__)


def add(db: Db, job: Job) -> None:
    marks = ", ".join("?" * len(Job.__struct_fields__))
    db.execute(f"INSERT INTO jobs ({_COLUMNS}) VALUES ({marks})", msgspec.structs.astuple(job))


def add_items(
    db: Db, job: str, requests: Iterable[tuple[str | None, bytes]], first: int = 0
) -> None:
    """Names and bodies, the first of them at this place. What is there already stays."""
    rows = ((job, place, name, body) for place, (name, body) in enumerate(requests, first))
    db.executemany(
        "INSERT INTO items (job, place, name, body) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (job, place) DO NOTHING",
        rows,
    )


def find(db: Db, account: str, job: str, kind: Kind) -> Job | None:
    query = f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND account = ? AND kind = ?"
    return next(_jobs(db, query, (job, account, kind)), None)


def num_open(db: Db, account: str) -> int:
    query = "SELECT count(*) FROM jobs WHERE account = ? AND ended IS NULL"
    return int(db.execute(query, (account,)).fetchone()[0])


def listed(db: Db, account: str, kind: Kind, *, after: str | None, limit: int) -> list[Job]:
    """Newest first; after a job of this id, if it is one of these."""
    older, values = "", [account, kind]
    if after is not None:
        since = "SELECT created FROM jobs WHERE id = ? AND account = ?"
        older = f"AND (created < ({since}) OR (created = ({since}) AND id < ?))"
        values += [after, account, after, account, after]
    query = f"SELECT {_COLUMNS} FROM jobs WHERE account = ? AND kind = ? {older}"
    return list(_jobs(db, f"{query} ORDER BY created DESC, id DESC LIMIT {limit:d}", values))


def some_to_claim(db: Db, now: float) -> bool:
    query = "SELECT 1 FROM jobs WHERE ended IS NULL AND lease_until < ? LIMIT 1"
    return db.execute(query, (now,)).fetchone() is not None


def claim(db: Db, holder: str, now: float, lease_s: float) -> Job | None:
    """The job to go on with, of which nobody has the lease; now `holder` has.

    Accounts of which the fewest are being worked on go first, then what nobody has held yet, the
    oldest first, then what has rested for longest.
    """
    row = db.execute(
        "SELECT id FROM jobs LEFT JOIN (SELECT account AS who, count(*) AS num FROM jobs"
        " WHERE ended IS NULL AND lease_until >= ? AND holder != '' GROUP BY account) AS busy"
        " ON busy.who = jobs.account WHERE ended IS NULL AND lease_until < ?"
        " ORDER BY coalesce(busy.num, 0), lease_until, created LIMIT 1",
        (now, now),
    ).fetchone()
    if row is None:
        return None
    db.execute(
        "UPDATE jobs SET holder = ?, lease_until = ?, started = coalesce(started, ?),"
        " status = CASE status WHEN 'queued' THEN 'running' ELSE status END WHERE id = ?",
        (holder, now + lease_s, now, row[0]),
    )
    return next(_jobs(db, f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", row))


def renew(db: Db, job: str, holder: str, now: float, lease_s: float) -> Status | None:
    """How the job stands, with the lease prolonged; None: `holder` has lost it."""
    row = db.execute(
        "UPDATE jobs SET lease_until = ? WHERE id = ? AND holder = ? AND ended IS NULL"
        " RETURNING status",
        (now + lease_s, job, holder),
    ).fetchone()
    return None if row is None else row[0]


def release(db: Db, job: str, holder: str, rest_until: float = 0.0) -> None:
    """Let others go on, but not before then."""
    db.execute(
        "UPDATE jobs SET lease_until = ?, holder = '' WHERE id = ? AND holder = ?"
        " AND ended IS NULL",
        (rest_until, job, holder),
    )


def admit(db: Db, job: Job, total: int) -> None:
    """The requests of a batch are all there: they begin. Unless it is cancelled."""
    db.execute(
        "UPDATE jobs SET status = 'running', total = ?"
        " WHERE id = ? AND holder = ? AND status = 'validating'",
        (total, job.id, job.holder),
    )


def places_waiting(db: Db, job: str) -> list[int]:
    query = "SELECT place FROM items WHERE job = ? AND status IS NULL ORDER BY place"
    return [row[0] for row in db.execute(query, (job,))]


def next_of(db: Db, job: str, place: int) -> tuple[Status, bytes | None]:
    """How the job stands, and a request of it; None if that has an answer, or is gone."""
    row = db.execute(
        "SELECT jobs.status, items.body FROM jobs LEFT JOIN items"
        " ON items.job = jobs.id AND items.place = ? AND items.status IS NULL WHERE jobs.id = ?",
        (place, job),
    ).fetchone()
    return ("cancelled", None) if row is None else (row[0], row[1])


def answer(db: Db, job: str, item: Item, *, used: tuple[int, int]) -> bool:
    """Keep the answer of this item, unless it has one; whether it was kept.

    The request itself is not needed any more. `used`: tokens of prompt and completion.
    """
    kept = db.execute(
        "UPDATE items SET status = ?, answer = ?, request_id = ?, body = ?"
        " WHERE job = ? AND place = ? AND status IS NULL",
        (item.status, item.answer, item.request_id, b"", job, item.place),
    ).rowcount
    if not kept:
        return False
    ok = item.status == 200
    db.execute(
        "UPDATE jobs SET completed = completed + ?, failed = failed + ?,"
        " prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ?"
        " WHERE id = ?",
        (int(ok), int(not ok), *used, job),
    )
    return True


def items(db: Db, job: str, first: int = 0, most: int = -1) -> list[Item]:
    """In order, from this place on."""
    query = f"SELECT {_ITEM_COLUMNS} FROM items WHERE job = ? AND place >= ? ORDER BY place"
    rows = db.execute(f"{query} LIMIT {most:d}" if most >= 0 else query, (job, first))
    return [Item(**dict(zip(Item.__struct_fields__, row, strict=True))) for row in rows]


def finish(db: Db, job: Job, status: Status, extra: Extra, now: float) -> bool:
    """The end of a job; whether `job.holder` was still the one to say so.

    Its webhook is to be called from now on. What was answered stays untouched: there may be much.
    """
    changed = db.execute(
        "UPDATE jobs SET status = ?, ended = ?, extra = ?, lease_until = 0"
        " WHERE id = ? AND holder = ? AND ended IS NULL",
        (status, now, msgspec.json.encode(extra), job.id, job.holder),
    ).rowcount
    if not changed:
        return False
    db.execute("UPDATE items SET body = ? WHERE job = ? AND status IS NULL", (b"", job.id))
    if job.webhook:
        db.execute(
            "INSERT INTO hooks (job, url, account, tries, due, holder, lease_until)"
            " VALUES (?, ?, ?, 0, ?, '', 0) ON CONFLICT (job) DO NOTHING",
            (job.id, job.webhook, job.account, now),
        )
    return True


def cancel(db: Db, job: Job, now: float) -> None:
    """No more of its requests begin. Whoever works on it, or comes next, ends it."""
    extra = job.more
    extra.cancelling_at = now
    db.execute(
        "UPDATE jobs SET status = 'cancelling', extra = ?,"
        " lease_until = CASE holder WHEN '' THEN 0 ELSE lease_until END"  # no rest any more
        " WHERE id = ? AND ended IS NULL AND status != 'cancelling'",
        (msgspec.json.encode(extra), job.id),
    )


def prune(db: Db, now: float, limit: int) -> int:
    """Drop jobs whose time has come, up to so many rows of theirs; how many."""
    # Nobody finds them any more, though their requests may take a while to go.
    db.execute("UPDATE jobs SET account = '' WHERE forget < ? AND account != ''", (now,))
    num_items = db.execute(drop_parts("items", "job", "jobs"), (now, limit)).rowcount
    query = "SELECT id FROM jobs WHERE forget < ? LIMIT ?"
    gone = db.execute(query, (now, limit - num_items)).fetchall() if num_items < limit else []
    for table, column in (("hooks", "job"), ("jobs", "id")):
        db.executemany(f"DELETE FROM {table} WHERE {column} = ?", gone)
    return num_items + len(gone)


def _jobs(db: Db, query: str, values: Sequence[Any]) -> Iterator[Job]:
    for row in db.execute(query, values):
        yield Job(**dict(zip(Job.__struct_fields__, row, strict=True)))
