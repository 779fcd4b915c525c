"""A worker's link to real engine processes, and to some that misbehave."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from infire.notes import Note, Submit
from infire.request import Step
from origin_gpu import engine_link
from origin_gpu.engine_link import EngineGone, EngineLink, Run
from origin_gpu.engine_process import STOP_S, EngineLost, EngineSocket
from routing.errors import Code, Failure
from routing.link_flow import Wake
from tests.fakes.sequences import answer, sequence
from tests.origin_gpu.local_workers import COUNTING_ENGINE, PATIENCE_S

COUNTING = (sys.executable, str(COUNTING_ENGINE))
SLOW = (sys.executable, str(COUNTING_ENGINE.with_name("faulty_engine.py")))
ODD = (sys.executable, str(COUNTING_ENGINE.with_name("odd_engine.py")))


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not holds():
            await anyio.sleep(0.002)


def children(command: Sequence[str]) -> list[psutil.Process]:
    """The processes that this one has started with `command`, and that live."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and child.cmdline()[1:2] == [command[1]]
    ]


@asynccontextmanager
async def running(*flags: str) -> AsyncGenerator[EngineLink, None]:
    """A link whose engine is up; at the end nothing may be left in there."""
    link = EngineLink((*COUNTING, *flags))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        await until(lambda: link.gauges.total_blocks > 0)
        yield link
        await idle(link)
        tasks.cancel_scope.cancel()


async def idle(link: EngineLink) -> None:
    await until(lambda: 0 < link.gauges.free_blocks == link.gauges.total_blocks)
    assert link.gauges.running == link.gauges.waiting == link.gauges.held == 0


async def ids_of(link: EngineLink, submit: Submit) -> list[int]:
    steps: list[Step] = []
    with anyio.fail_after(PATIENCE_S):
        async with link.request(submit, steps.append) as run:
            assert await run.wait_finished() is steps[-1]
    return [token_id for step in steps for token_id in step.ids]


@asynccontextmanager
async def held(
    link: EngineLink, num_prompt: int = 5, path: Path | None = None
) -> AsyncGenerator[Run, None]:
    """A request that has finished, and whose KV is kept; also at `path`."""
    submit = Submit(
        sequence("held", num_prompt, 1, hold=True), export_path=str(path) if path else None
    )
    written = anyio.Event()
    with anyio.fail_after(PATIENCE_S):
        async with link.request(submit, lambda step: None) as run:
            run.on_export = lambda exported: written.set()
            await run.wait_finished()
            if path:
                await written.wait()
            yield run


async def test_every_request_gets_its_own_tokens() -> None:
    draw = random.Random(7)
    shapes = [(draw.randint(1, 40), draw.randint(1, 30)) for _ in range(300)]
    got: dict[int, list[int]] = {}
    async with running() as link:

        async def ask(n: int) -> None:
            got[n] = await ids_of(link, Submit(sequence("same name", *shapes[n])))

        async with anyio.create_task_group() as tasks:
            for n in range(len(shapes)):
                tasks.start_soon(ask, n)
    assert got == {n: answer(*shape) for n, shape in enumerate(shapes)}


async def test_the_notes_of_a_tick_go_in_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    send = EngineSocket.send

    async def counted(self: EngineSocket, notes: Sequence[Note]) -> None:
        frames.append(len(notes))
        await send(self, notes)

    monkeypatch.setattr(EngineSocket, "send", counted)
    async with running() as link, anyio.create_task_group() as tasks:
        for n in range(50):
            tasks.start_soon(ids_of, link, Submit(sequence(f"r{n}")))
    assert frames == [50]


async def test_listeners_are_not_woken_by_every_token() -> None:
    class Counting(Wake):
        count = 0

        def set(self) -> None:
            self.count += 1

    listener = Counting()
    async with running() as link:
        link.listeners.add(listener)
        await ids_of(link, Submit(sequence("a", 3, 200)))
        await idle(link)
    assert 2 <= listener.count <= 8  # it runs, it has ended; and the engine's end


async def test_an_error_in_who_hears_a_step_is_not_lost() -> None:
    def broken(step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with running() as link, link.request(Submit(sequence("a", 3, 200)), broken) as run:
            await run.wait_finished()
    assert caught.group_contains(ZeroDivisionError)


async def test_leaving_drops_what_is_left() -> None:
    async with running("--step-s", "0.01") as link:
        async with link.request(Submit(sequence("a", 3, 9000)), lambda step: None):
            await until(lambda: link.gauges.running == 1)
        await idle(link)
        with anyio.move_on_after(0.1):
            await ids_of(link, Submit(sequence("b", 3, 9000)))
        await idle(link)


async def test_a_late_step_of_a_dropped_request_reaches_nobody() -> None:
    """The same name is asked again while the engine still answers the first."""
    async with running("--step-s", "0.05") as link:
        steps: list[Step] = []
        async with link.request(Submit(sequence("a", 3, 9000)), steps.append):
            await until(lambda: bool(steps))
        assert await ids_of(link, Submit(sequence("a", 200, 3))) == answer(200, 3)


async def test_a_refused_request_says_why() -> None:
    async with running("--kv-tokens", "64") as link:
        with pytest.raises(Failure, match="exceed the 64 tokens") as refused:
            await ids_of(link, Submit(sequence("a", 3, 100)))
        assert refused.value.code is Code.BAD_INPUT


async def test_kv_goes_from_one_engine_to_another(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    async with running() as giver, running() as taker:
        async with held(giver, 300, path):
            assert path.stat().st_size == 2400
            assert giver.gauges.held == 1
            steps: list[Step] = []
            submit = Submit(sequence("b", 300, 4, generated=1), str(path), 300)
            with anyio.fail_after(PATIENCE_S):
                async with taker.request(submit, steps.append) as run:
                    await run.wait_adopted()
                    path.unlink()
                    await run.wait_finished()
        await idle(giver)
        assert [i for step in steps for i in step.ids] == answer(300, 4, generated=1)
        assert taker.gauges.prompt_tokens_computed == 0


async def test_kv_that_cannot_be_read_is_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.write_bytes(bytes(79))  # of 80
    async with running() as link:
        for where, code in ((path, Code.INCOMPATIBLE), (tmp_path / "none", Code.LOST)):
            with pytest.raises(Failure) as refused:
                await ids_of(link, Submit(sequence("a", 10, 4, generated=1), str(where), 10))
            assert refused.value.code is code


async def test_kv_that_cannot_be_written_ends_the_request(tmp_path: Path) -> None:
    async with running() as link:
        with pytest.raises(Failure) as failed:
            async with held(link, 5, tmp_path / "no folder" / "kv"):
                pass
        assert failed.value.code is Code.LOST


async def test_when_the_engine_dies_its_requests_fail_and_another_starts() -> None:
    """The running, the waiting, and the one that is only held."""
    async with running("--step-s", "0.01", "--max-running", "1") as link:
        epoch, lost = link.epoch, []

        async def ask(entering: Any, entered: anyio.Event) -> None:
            try:
                async with entering:
                    entered.set()
                    await anyio.sleep_forever()
            except Failure as failure:
                lost.append(failure)

        async with anyio.create_task_group() as tasks:
            for entering in (
                held(link),
                link.request(Submit(sequence("a", 3, 9000)), lambda step: None),
                link.request(Submit(sequence("b", 3, 9000)), lambda step: None),
            ):
                entered = anyio.Event()
                tasks.start_soon(ask, entering, entered)
                await entered.wait()
            await until(lambda: link.gauges.held == link.gauges.running == link.gauges.waiting == 1)
            (engine,) = children(COUNTING)
            engine.kill()
            await until(lambda: link.hello is None)
            assert not link.fresh
            with pytest.raises(Failure) as refused:
                await ids_of(link, Submit(sequence("c")))
            assert refused.value.code is Code.UNAVAILABLE
            assert refused.value.retry_after_s
        assert [failure.code for failure in lost] == [Code.LOST] * 3
        await until(lambda: link.fresh)
        assert link.epoch != epoch
        assert await ids_of(link, Submit(sequence("d"))) == answer(3, 4)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("dies", "exit code 3"),
        ("babbles", "malformed frame of 3 bytes"),
        ("breaks", "the weights are of another model"),
    ],
)
async def test_an_engine_that_dies_again_and_again_is_given_up(
    behaviour: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "FIRST_PAUSE_S", 0.001)
    link = EngineLink((*ODD, behaviour))
    epochs = set()
    listener = engine_link.Wake()
    listener.set = lambda: epochs.add(link.epoch)  # type: ignore[method-assign]
    link.listeners.add(listener)
    with anyio.fail_after(PATIENCE_S), pytest.raises(EngineGone, match=said):
        await link.run()
    assert link.num_starts == len(epochs) == engine_link.MOST_RESTARTS + 1
    assert not children(ODD)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*ODD, "never-loads"), "the weights are of another model"),
        ((sys.executable, "-c", "raise SystemExit(4)"), "exit code 4"),
        (("/no/such/engine",), "/no/such/engine cannot be started"),
    ],
)
async def test_an_engine_that_never_comes_up_is_not_tried_again(
    command: tuple[str, ...], said: str
) -> None:
    link = EngineLink(command)
    with anyio.fail_after(PATIENCE_S), pytest.raises(EngineGone, match=said):
        await link.run()
    assert link.num_starts == 1


async def stopped_at_its_first_step(link: EngineLink, stop: Callable[[Step], None]) -> None:
    async with link.request(Submit(sequence("a", 3, 9000)), stop) as run:
        await run.wait_finished()


@pytest.mark.slow
async def test_an_engine_that_says_nothing_for_too_long_is_ended_and_replaced() -> None:
    """Stopped, it says nothing, and it would never end by itself."""
    link = EngineLink((*COUNTING, "--step-s", "0.01"), stuck_s=2.5)  # it beats once a second
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        await until(lambda: link.gauges.total_blocks > 0)
        epoch, (engine,) = link.epoch, children(COUNTING)

        def stop(step: Step) -> None:
            engine.suspend()

        with pytest.raises(Failure, match=r"said nothing for 2\.5 s") as lost:
            await stopped_at_its_first_step(link, stop)
        assert lost.value.code is Code.LOST
        await until(lambda: link.fresh)
        assert link.epoch != epoch
        assert link.num_starts == 2
        assert engine.pid not in {it.pid for it in children(COUNTING)}
        assert await ids_of(link, Submit(sequence("b"))) == answer(3, 4)
        tasks.cancel_scope.cancel()


async def test_an_engine_that_takes_long_to_load_is_not_taken_for_stuck() -> None:
    link = EngineLink((*SLOW, "--slow-load-s", "1.5"), stuck_s=0.3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        await until(lambda: link.hello is not None)
        assert link.num_starts == 1
        tasks.cancel_scope.cancel()


async def test_deaths_far_apart_are_no_series() -> None:
    now = anyio.current_time()
    apart = engine_link.WITHIN_S / 3.5
    deaths = deque(now - n * apart for n in range(20, 0, -1))
    first = engine_link._pause_s(deaths, EngineLost("so"))
    assert first == engine_link.FIRST_PAUSE_S * 8  # three others in the last minute
    assert len(deaths) == 4


async def test_stopping_the_worker_ends_the_engine_even_a_stubborn_one() -> None:
    for command in (COUNTING, (*ODD, "stubborn")):
        link = EngineLink(command)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.run)
            await until(lambda link=link: link.hello is not None)
            assert len(children(command)) == 1
            began = anyio.current_time()
            tasks.cancel_scope.cancel()
        assert not children(command)
        assert anyio.current_time() - began < STOP_S + 3  # within the 5 s that a worker has


async def test_an_engine_holds_no_end_of_anothers_socket() -> None:
    """Else it would not see its own worker's end close, nor the other's."""
    async with running(), running():
        engines = children(COUNTING)
        assert [len(it.net_connections("unix")) for it in engines] == [1, 1]
