"""What an edge does for jobs, with an app that answers as it is told and a clock that is passed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edge import jobs
from edge.inside import asks_inside
from edge.job_runner import LEASE_S, MOST_JOBS, JobRunner, end_of, used
from edge.jobs import Extra, Item, Job, Status
from edge.pace import FIRST_S, LAST_S, Pace
from edge.store import Store
from routing.drain import Drain


class NoBatches:
    async def admit(self, job: Job) -> None:
        raise AssertionError(job)

    async def outputs(self, job: Job, extra: Extra, ended: Status) -> None:
        raise AssertionError(job)


@dataclass
class App:
    """Answers each request by the statuses that are left for its body; then with 200."""

    statuses: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    gate: anyio.Event | None = None
    gates: dict[str, anyio.Event] = field(default_factory=dict)  # of those bodies
    retry_after: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = asks_inside(scope)
        assert tenant is not None
        assert scope["path"] == f"/client/v4/accounts/{tenant.account}/ai/run/m"
        body = (await Request(scope, receive).body()).decode()
        self.asked.append(body)
        if (gate := self.gates.get(body, self.gate)) is not None:
            await gate.wait()
        left = self.statuses.get(body, [])
        status = left.pop(0) if left else 200
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        headers = {"x-request-id": f"id-{len(self.asked)}"}
        if self.retry_after is not None:
            headers["retry-after"] = self.retry_after
        await JSONResponse({"result": {"usage": usage}}, status, headers)(scope, receive, send)


@dataclass
class Bench:
    store: Store
    app: App
    drain: Drain
    now: float = 1000.0
    runner: JobRunner | None = None

    def clock(self) -> float:
        return self.now

    async def add(
        self, *bodies: str, deadline: float = 1e9, name: str = "", account: str = "acme"
    ) -> str:
        job = Job(
            id=name or f"j{self.now}", account=account, key_id="k", kind="queue", route="run/m",
            model="m", status="queued", created=self.now, deadline=deadline, forget=2e9,
            total=len(bodies),
        )  # fmt: skip

        def work(db: jobs.Db) -> None:
            jobs.add(db, job)
            jobs.add_items(db, job.id, [(None, body.encode()) for body in bodies])

        await self.store.write(work)
        return job.id

    async def job(self, name: str) -> Job:
        for account in ("acme", "globex"):
            find = partial(jobs.find, account=account, job=name, kind="queue")
            if (found := await self.store.read(find)) is not None:
                return found
        raise AssertionError(name)

    async def ended(self, name: str) -> tuple[Job, list[Item]]:
        with anyio.fail_after(20):
            while (job := await self.job(name)).ended is None:
                await anyio.sleep(0.02)
        return job, await self.store.read(partial(jobs.items, job=name))

    async def until(self, is_so: Callable[[], bool]) -> None:
        with anyio.fail_after(20):
            while not is_so():
                await anyio.sleep(0.01)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncGenerator[Bench, None]:
    store = Store(tmp_path / "store.sqlite")
    made = Bench(store, App(), Drain(1.0))
    runner = JobRunner(store, made.drain, made.clock, batches=NoBatches(), in_flight=2)
    made.runner = runner
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, made.app)
        yield made
        tasks.cancel_scope.cancel()
    store.close()


async def test_answers_and_tokens_are_kept(bench: Bench) -> None:
    job, items = await bench.ended(await bench.add("a", "b", "c"))
    assert (job.status, job.completed, job.failed) == ("completed", 3, 0)
    assert (job.prompt_tokens, job.completion_tokens) == (6, 9)
    assert [item.status for item in items] == [200] * 3
    assert {item.request_id for item in items} == {"id-1", "id-2", "id-3"}
    assert [item.body for item in items] == [b""] * 3
    assert sorted(bench.app.asked) == ["a", "b", "c"]


async def test_a_refusal_is_an_answer(bench: Bench) -> None:
    bench.app.statuses = {"b": [400]}
    job, items = await bench.ended(await bench.add("a", "b"))
    assert (job.completed, job.failed, len(bench.app.asked)) == (1, 1, 2)
    assert [item.status for item in items] == [200, 400]


async def test_what_fails_is_asked_three_times(bench: Bench) -> None:
    bench.app.statuses = {"a": [500, 408], "b": [500, 500, 500]}
    job, items = await bench.ended(await bench.add("a", "b"))
    assert (job.status, [item.status for item in items]) == ("completed", [200, 500])
    assert sorted(bench.app.asked) == ["a"] * 3 + ["b"] * 3


async def test_where_there_is_no_room_it_waits(bench: Bench) -> None:
    """As long as the clock says: nothing is asked before."""
    bench.app.statuses = {"a": [429, 503]}
    name = await bench.add("a")
    await bench.until(lambda: len(bench.app.asked) == 1)
    await anyio.sleep(0.3)
    assert len(bench.app.asked) == 1
    bench.now += FIRST_S
    await bench.until(lambda: len(bench.app.asked) == 2)
    bench.now += 2 * FIRST_S
    job, [item] = await bench.ended(name)
    assert (item.status, job.failed) == (200, 0)


async def test_those_that_find_no_room_make_way_for_others(bench: Bench) -> None:
    """As many as one edge works on at once, before one that there is room for."""
    bench.app.statuses = {"full": [429] * 1000}
    bench.app.retry_after = "3600"
    full = [await bench.add("full", "full", name=f"full {n}") for n in range(MOST_JOBS)]
    assert (await bench.ended(await bench.add("a", name="other")))[0].completed == 1
    assert [(await bench.job(name)).completed for name in full] == [0] * MOST_JOBS
    bench.app.statuses = {}
    bench.now += LAST_S + 1
    for name in full:
        assert (await bench.ended(name))[0].completed == 2


async def test_large_jobs_make_way_for_others_by_turns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as one edge works on at once, of one account, before a small one of another's."""
    monkeypatch.setattr("edge.job_runner.TURN_S", 5.0)
    large = [await bench.add(*"abcdefgh" * 250, name=f"large {n}") for n in range(MOST_JOBS)]
    await bench.until(lambda: len(bench.app.asked) > 2 * MOST_JOBS)
    bench.now += 6.0
    await bench.add("x", name="x", account="globex")
    assert bench.runner is not None
    bench.runner.wake()
    assert (await bench.ended("x"))[0].completed == 1
    assert [(await bench.job(name)).ended for name in large] == [None] * MOST_JOBS
    bench.now += 1.0  # and nothing is left of a turn
    rested = [it for it in [await bench.job(name) for name in large] if not it.holder]
    for name in [it.id for it in rested]:
        with anyio.fail_after(20):
            while not (await bench.job(name)).holder:
                await anyio.sleep(0.02)


async def test_who_makes_way_does_not_go_on_alone(bench: Bench) -> None:
    """One of its requests took longer, and was answered: all go on after a rest, or none."""
    bench.app.gates = {name: anyio.Event() for name in ("slow", "full")}
    bench.app.statuses = {"full": [429]}
    bench.app.retry_after = "3600"
    name = await bench.add("slow", "full", "a", "b")
    await bench.until(lambda: len(bench.app.asked) == 2)
    bench.app.gates["full"].set()
    await anyio.wait_all_tasks_blocked()
    bench.app.gates["slow"].set()
    with anyio.fail_after(20):
        while (await bench.job(name)).holder:
            await anyio.sleep(0.02)
    assert sorted(bench.app.asked) == ["full", "slow"]
    bench.app.gate = anyio.Event()
    bench.now += LAST_S + 1
    await bench.until(lambda: len(bench.app.asked) == 5)  # two at once
    bench.app.gate.set()
    assert (await bench.ended(name))[0].completed == 4


async def test_what_rests_is_cancelled_at_once(bench: Bench) -> None:
    bench.app.statuses = {"a": [429] * 1000}
    bench.app.retry_after = "3600"
    name = await bench.add("a")
    with anyio.fail_after(20):
        while (await bench.job(name)).holder or not bench.app.asked:
            await anyio.sleep(0.02)
    job = await bench.job(name)
    assert job.lease_until == bench.now + LAST_S
    await bench.store.write(partial(jobs.cancel, job=job, now=bench.now))
    assert (await bench.ended(name))[0].status == "cancelled"


async def test_the_end_of_its_time_ends_a_rest(bench: Bench) -> None:
    bench.app.statuses = {"a": [429] * 1000}
    bench.app.retry_after = "3600"
    name = await bench.add("a", deadline=bench.now + 1)
    await bench.until(lambda: len(bench.app.asked) == 1)
    bench.now += 1.1
    assert (await bench.ended(name))[0].status == "expired"


async def test_what_has_no_answer_in_time_has_none(bench: Bench) -> None:
    bench.app.statuses = {"b": [429] * 100}
    name = await bench.add("a", "b", deadline=bench.now + 100_000)
    with anyio.fail_after(20):
        while not (await bench.job(name)).completed:
            bench.now += LAST_S
            await anyio.sleep(0.05)
    bench.now += 100_000
    job, items = await bench.ended(name)
    assert (job.status, [item.status for item in items]) == ("expired", [200, None])


async def test_who_has_lost_the_lease_stops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another has taken it, as after a pause of this process: nothing more is asked here."""
    monkeypatch.setattr("edge.job_runner.LEASE_S", 0.4)
    bench.app.gate = anyio.Event()
    name = await bench.add(*"abcdef")
    await bench.until(lambda: len(bench.app.asked) == 2)
    taken = await bench.store.write(
        partial(jobs.claim, holder="other", now=bench.now + 100, lease_s=100)
    )
    assert taken is not None
    await anyio.sleep(0.5)
    bench.app.gate.set()
    await anyio.sleep(0.5)
    assert len(bench.app.asked) == 2
    job = await bench.job(name)
    assert (job.holder, job.completed) == ("other", 0)
    bench.now += 300  # and that one dies
    assert (await bench.ended(name))[0].completed == 6


async def test_who_is_told_to_stop_ends_what_it_has_asked(bench: Bench) -> None:
    bench.app.gate = anyio.Event()
    name = await bench.add(*"abcdef")
    await bench.until(lambda: len(bench.app.asked) == 2)
    bench.drain.begin(0.0)
    bench.app.gate.set()
    with anyio.fail_after(10):
        while (await bench.job(name)).lease_until:
            await anyio.sleep(0.02)
    job = await bench.job(name)
    assert (job.completed, job.ended, len(bench.app.asked)) == (2, None, 2)
    assert bench.now < job.created + LEASE_S  # nobody had to wait for the lease


async def test_a_bug_ends_neither_edge_nor_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.job_runner.LEASE_S", 0.3)
    find = jobs.find
    times = 2

    def broken(*args: object, **more: object) -> Job | None:
        nonlocal times
        times -= 1
        if times >= 0:
            raise ZeroDivisionError
        return find(*args, **more)  # type: ignore[arg-type]

    name = await bench.add("a")
    monkeypatch.setattr("edge.job_runner.jobs.find", broken)
    await bench.until(lambda: times < 0)
    assert (await bench.ended(name))[0].status == "completed"
    assert bench.app.asked == ["a"]


@pytest.mark.parametrize(
    ("status", "num_waiting", "is_late", "ends"),
    [
        ("running", 0, False, "completed"),
        ("running", 0, True, "completed"),
        ("running", 1, True, "expired"),
        ("running", 1, False, None),
        ("cancelling", 1, False, "cancelled"),
        ("cancelling", 0, True, "cancelled"),
    ],
)
def test_how_a_job_ends(status: Status, num_waiting: int, is_late: bool, ends: str | None) -> None:
    assert end_of(status, num_waiting, is_late) == ends


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}, (1, 2)),
        ({"result": {"usage": {"prompt_tokens": 1}}}, (1, 0)),
        ({"result": [[1.0]]}, (0, 0)),
        ({"result": None, "success": False}, (0, 0)),
    ],
)
def test_tokens_of_an_answer(body: object, tokens: tuple[int, int]) -> None:
    assert used(msgspec.json.encode(body)) == tokens


def test_pauses_grow_and_end() -> None:
    pace, now, waits = Pace(), 0.0, []
    for _ in range(10):
        pace.busy(now, None)
        pace.busy(now, None)  # another that was told so at the same time
        waits.append(pace.wait_s(now))
        now += waits[-1]
    assert waits[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert waits[-1] == LAST_S
    pace.fine()
    assert pace.wait_s(now) == 0
    pace.busy(now, 3.0)
    assert pace.wait_s(now) == 3.0
