"""Jobs under leases: a walk with a passed clock, and processes that are killed at any moment."""

from __future__ import annotations

import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import anyio
import msgspec
import pytest

from edge import jobs
from edge.jobs import Extra, Item, Job
from edge.store import Store
from tests.edge.test_store import process

LEASE_S = 10.0


@pytest.fixture
def db(tmp_path: Path) -> Generator[sqlite3.Connection, None, None]:
    path = tmp_path / "store.sqlite"
    Store(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    yield connection
    connection.close()


def job(name: str, account: str = "acme", created: float = 0.0, total: int = 3) -> Job:
    return Job(
        id=name, account=account, key_id="k", kind="queue", route="run/m", model="m",
        status="queued", created=created, deadline=1e12, forget=2e12, total=total,
    )  # fmt: skip


def add(db: sqlite3.Connection, made: Job) -> None:
    jobs.add(db, made)
    jobs.add_items(db, made.id, [(None, b"{}")] * made.total)


def answered(place: int, by: str) -> Item:
    return Item(place=place, name=None, body=b"", status=200, answer=b"{}", request_id=by)


class Walk:
    """Workers that hold jobs, die, and are late; and what must be so whatever they do."""

    def __init__(self, db: sqlite3.Connection, seed: int) -> None:
        self.db = db
        self.rng = random.Random(seed)
        self.now = 0.0
        self.num_made = 0
        self.held: dict[str, tuple[Job, float]] = {}  # by holder; until when it may believe so
        self.written: dict[tuple[str, int], str] = {}  # the answers that were kept
        self.ended: set[str] = set()

    def check(self) -> None:
        believed = Counter(it.id for it, until in self.held.values() if until > self.now)
        assert all(n == 1 for n in believed.values()), believed
        for name, completed in self.db.execute("SELECT id, completed FROM jobs"):
            mine = {at: by for (of, at), by in self.written.items() if of == name}
            assert completed == len(mine)
            query = "SELECT place, request_id FROM items WHERE job = ? AND status IS NOT NULL"
            assert dict(self.db.execute(query, (name,)).fetchall()) == mine

    def act(self) -> None:
        acts = [self.add, self.claim, self.claim, self.wait]
        if self.held:
            acts += [self.answer] * 3 + [self.finish] * 2 + [self.die, self.renew, self.release]
        self.rng.choice(acts)()
        self.check()

    def add(self) -> None:
        if self.num_made < 12:
            rng, name = self.rng, f"j{self.num_made}"
            add(self.db, job(name, rng.choice("ab"), self.now, rng.choice([0, 1, 3])))
            self.num_made += 1

    def claim(self) -> None:
        holder = f"h{self.rng.random()}"
        found = jobs.claim(self.db, holder, self.now, LEASE_S)
        if found is not None:
            self.held[holder] = (found, self.now + LEASE_S)

    def wait(self) -> None:
        self.now += self.rng.choice([0.1, 3.0, LEASE_S + 0.1])

    def die(self) -> None:
        del self.held[self.rng.choice(list(self.held))]

    def renew(self) -> None:
        holder, mine, until = self._one()
        if jobs.renew(self.db, mine.id, holder, self.now, LEASE_S) is not None:
            self.held[holder] = (mine, self.now + LEASE_S)
        else:
            assert until <= self.now or mine.id in self.ended  # nobody is robbed
            del self.held[holder]

    def release(self) -> None:
        holder, mine, _ = self._one()
        jobs.release(self.db, mine.id, holder)
        del self.held[holder]

    def answer(self) -> None:
        """Also of one who has lost the lease and does not know."""
        _, mine, _ = self._one()
        if mine.total:
            place, by = self.rng.randrange(mine.total), f"r{self.rng.random()}"
            kept = jobs.answer(self.db, mine.id, answered(place, by), used=(1, 1))
            assert kept == ((mine.id, place) not in self.written)
            if kept:
                self.written[mine.id, place] = by

    def finish(self) -> None:
        holder, mine, _ = self._one()
        if jobs.places_waiting(self.db, mine.id):
            return
        query = "SELECT holder FROM jobs WHERE id = ?"
        is_mine = self.db.execute(query, (mine.id,)).fetchone()[0] == holder
        done = jobs.finish(self.db, mine, "completed", Extra(), self.now)
        assert done == (is_mine and mine.id not in self.ended)
        if done:
            self.ended.add(mine.id)
        del self.held[holder]

    def end(self) -> None:
        """All are dead but one, who does what is left."""
        self.held.clear()
        self.now += LEASE_S + 1
        while (left := jobs.claim(self.db, "last", self.now, LEASE_S)) is not None:
            for place in jobs.places_waiting(self.db, left.id):
                assert jobs.answer(self.db, left.id, answered(place, "last"), used=(0, 0))
                self.written[left.id, place] = "last"
            assert jobs.finish(self.db, left, "completed", Extra(), self.now)
            self.check()

    def _one(self) -> tuple[str, Job, float]:
        holder = self.rng.choice(list(self.held))
        return holder, *self.held[holder]


@pytest.mark.parametrize("seed", range(20))
def test_walk(db: sqlite3.Connection, seed: int) -> None:
    """Whatever workers do and whenever they die: one at a time has a job, an answer is written once
    and stays, counts are right, and in the end all is done."""
    walk = Walk(db, seed)
    for _ in range(400):
        walk.act()
    walk.end()
    statuses = db.execute("SELECT status FROM jobs").fetchall()
    assert len(statuses) == walk.num_made > 0
    assert set(statuses) == {("completed",)}


def test_the_account_of_which_least_is_done_goes_first(db: sqlite3.Connection) -> None:
    for n in range(3):
        add(db, job(f"a{n}", "a", created=n))
    add(db, job("b0", "b", created=9))
    order = [jobs.claim(db, f"h{n}", 10.0, LEASE_S) for n in range(4)]
    assert [it.id for it in order if it] == ["a0", "b0", "a1", "a2"]
    assert jobs.claim(db, "h9", 10.0, LEASE_S) is None


def test_what_rests_is_not_worked_on(db: sqlite3.Connection) -> None:
    """The other jobs of its account are as near to their turn as anybody's."""
    for n in range(3):
        add(db, job(f"a{n}", "a", created=n))
        resting = jobs.claim(db, "h", 10.0, LEASE_S)
        assert resting is not None
        jobs.release(db, resting.id, "h", rest_until=25.0)
    add(db, job("a3", "a", created=3))
    add(db, job("b0", "b", created=9))
    order = [jobs.claim(db, f"h{n}", 10.0, LEASE_S) for n in range(2)]
    assert [it.id for it in order if it] == ["a3", "b0"]


def test_ends_are_told_to_a_webhook_once(db: sqlite3.Connection) -> None:
    add(db, msgspec.structs.replace(job("j", total=0), webhook="http://a/"))
    mine = jobs.claim(db, "h", 1.0, LEASE_S)
    assert mine is not None
    assert jobs.finish(db, mine, "completed", Extra(), 2.0)
    assert not jobs.finish(db, mine, "completed", Extra(), 3.0)
    assert db.execute("SELECT job, due FROM hooks").fetchall() == [("j", 2.0)]
    assert jobs.prune(db, 2.1e12, 10) == 1
    assert db.execute("SELECT count(*) FROM hooks").fetchone()[0] == 0


def test_the_end_of_a_job_touches_no_answer(db: sqlite3.Connection) -> None:
    """However many there are: one transaction holds it, and others wait for that."""
    add(db, job("j", total=50))
    mine = jobs.claim(db, "h", 1.0, LEASE_S)
    assert mine is not None
    for place in range(48):
        assert jobs.answer(db, "j", answered(place, "h"), used=(0, 0))
    before = db.total_changes
    assert jobs.finish(db, mine, "expired", Extra(), 2.0)
    assert db.total_changes - before == 3  # the job, and what has no answer
    assert {item.body for item in jobs.items(db, "j")} == {b""}


def test_few_rows_are_dropped_at_once(db: sqlite3.Connection) -> None:
    """A job goes by and by, but for its account it is gone."""
    for name in ("a", "b"):
        add(db, msgspec.structs.replace(job(name, total=10), forget=5.0))
    add(db, job("kept"))
    rows = "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM items)"
    left, gone = db.execute(rows).fetchone()[0], 4
    while gone >= 4:
        gone = jobs.prune(db, 6.0, 4)
        assert jobs.find(db, "acme", "a", "queue") is jobs.find(db, "acme", "b", "queue") is None
        assert left - (left := db.execute(rows).fetchone()[0]) <= 4
    assert left == 4
    assert jobs.find(db, "acme", "kept", "queue") is not None


async def test_killed_between_any_two_steps(tmp_path: Path) -> None:
    """Two processes work; again and again one is killed at a random moment and another started.
    Nothing that was answered is asked again, and all is answered."""
    path = tmp_path / "store.sqlite"
    store = Store(path)
    num_items = 60
    for n in range(3):
        made = job(f"j{n}", total=num_items)
        await store.write(lambda db, made=made: add(db, made))  # type: ignore[misc]
    rng, said = random.Random(7), []
    workers = [process(path, "jobs", str(n)) for n in range(2)]
    for n in range(6):
        await anyio.sleep(rng.uniform(0.4, 0.9))
        victim = workers.pop(0)
        victim.send_signal(signal.SIGKILL)
        said.append((await anyio.to_thread.run_sync(victim.communicate))[0])
        workers.append(process(path, "jobs", str(10 + n)))
    for it in workers:
        said.append((await anyio.to_thread.run_sync(lambda it=it: it.communicate(timeout=60)))[0])  # type: ignore[misc]
        assert it.returncode == 0
    rows = await store.read(
        lambda db: db.execute("SELECT job, place, request_id FROM items").fetchall()
    )
    assert len(rows) == 3 * num_items
    kept = [tuple(line.split()[1:]) for text in said for line in text.splitlines()
            if line.startswith("kept") and len(line.split()) == 4]  # fmt: skip
    by_place = {(name, str(place)): by for name, place, by in rows}
    assert all(by_place[name, place] == by for name, place, by in kept)
    assert len({(name, place) for name, place, _ in kept}) == len(kept)
    asked = Counter(line for text in said for line in text.splitlines() if line[:5] == "asked")
    again = {line: n for line, n in asked.items() if n > 1}
    assert len(again) <= 6  # at most the one that each of the killed was at
    jobs_now = await store.read(
        lambda db: db.execute("SELECT status, completed, prompt_tokens FROM jobs").fetchall()
    )
    assert jobs_now == [("completed", num_items, num_items)] * 3
    store.close()
