"""A process that works on the store as an edge does, for tests of several at once.

    store_writer.py FILE hammer N NAME     N transactions that add one to a row all share, and a row
    store_writer.py FILE jobs SEED         claims jobs and answers their items until all are done
    store_writer.py FILE lock              takes the write lock, says so, and never gives it back

Run as a program. `jobs` may be killed at any moment: nothing is done at its end.
"""

from __future__ import annotations

import random
import sys
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import anyio

from edge import jobs
from edge.jobs import Extra, Item, Job
from edge.store import Db, Store

LEASE_S = 0.4


async def hammer(store: Store, count: int, name: str) -> None:
    for n in range(count):
        await store.write(partial(_add_one, name=f"{name}-{n}"))


def _add_one(db: Db, name: str) -> None:
    row = db.execute("SELECT secret FROM secrets WHERE account = 'counter'").fetchone()
    value = int(row[0]) + 1
    db.execute("UPDATE secrets SET secret = ? WHERE account = 'counter'", (str(value).encode(),))
    db.execute("INSERT INTO secrets (account, secret) VALUES (?, x'00')", (name,))


async def do_jobs(store: Store, seed: int) -> None:
    """Each act is one transaction of the store's, with a little time before it."""
    rng = random.Random(seed)
    while await store.read(_num_open):
        job = await store.write(
            partial(jobs.claim, holder=uuid4().hex, now=time.time(), lease_s=LEASE_S)
        )
        if job is None:
            await anyio.sleep(0.02)
            continue
        await _do(store, job, rng)


async def _do(store: Store, job: Job, rng: random.Random) -> None:
    for place in await store.read(partial(jobs.places_waiting, job=job.id)):
        await anyio.sleep(rng.uniform(0, 0.02))
        renewed = partial(
            jobs.renew, job=job.id, holder=job.holder, now=time.time(), lease_s=LEASE_S
        )
        if await store.write(renewed) is None:
            return
        _, body = await store.read(partial(jobs.next_of, job=job.id, place=place))
        if body is None:
            continue
        print(f"asked {job.id} {place}", flush=True)
        item = Item(
            place=place, name=None, body=b"", status=200, answer=body, request_id=uuid4().hex
        )
        kept = await store.write(partial(jobs.answer, job=job.id, item=item, used=(1, 2)))
        if kept:
            print(f"kept {job.id} {place} {item.request_id}", flush=True)
    done = partial(jobs.finish, job=job, status="completed", extra=Extra(), now=time.time())
    if await store.write(done):
        print(f"finished {job.id}", flush=True)


def _num_open(db: Db) -> int:
    return int(db.execute("SELECT count(*) FROM jobs WHERE ended IS NULL").fetchone()[0])


def lock(path: Path) -> None:
    import sqlite3

    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    print("locked", flush=True)
    time.sleep(1000)


def main() -> None:
    path, what, *more = sys.argv[1:]
    if what == "lock":
        lock(Path(path))
    elif what == "hammer":
        anyio.run(hammer, Store(Path(path)), int(more[0]), more[1])
    else:
        anyio.run(do_jobs, Store(Path(path)), int(more[0]))


if __name__ == "__main__":
    main()
