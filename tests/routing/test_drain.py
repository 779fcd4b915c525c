"""When a process that was told to stop may go, by a clock that is passed in."""

from __future__ import annotations

import anyio
import pytest

from routing.drain import LINGER_S, RETRY_AFTER_S, Drain
from routing.errors import Code, Failure

TOLD = 100.0


def told(num_left: int = 0, grace_s: float = 30.0) -> Drain:
    drain = Drain(grace_s)
    drain.num_left = lambda: num_left
    drain.begin(TOLD)
    return drain


def test_new_work_is_taken_until_it_is_told_to_stop() -> None:
    drain = Drain()
    drain.check()
    drain.begin(TOLD)
    with pytest.raises(Failure) as refused:
        drain.check()
    assert refused.value.code is Code.DRAINING
    assert refused.value.retry_after_s == RETRY_AFTER_S
    assert (Code.DRAINING.meaning.status, Code.DRAINING.elsewhere) == (503, True)


@pytest.mark.parametrize(
    ("num_left", "unsent", "after_s", "is_over"),
    [
        (0, False, 0.0, False),  # what is on its way is still refused by name
        (0, False, LINGER_S, True),
        (1, False, LINGER_S, False),
        (0, True, LINGER_S, False),
        (1, False, 29.9, False),
        (1, True, 30.0, True),
    ],
)
def test_it_goes_when_nothing_is_left_or_its_grace_is_over(
    num_left: int, unsent: bool, after_s: float, is_over: bool
) -> None:
    assert told(num_left).is_over(TOLD + after_s, unsent=unsent) is is_over


def test_without_grace_it_goes_at_once() -> None:
    assert told(5, grace_s=0.0).is_over(TOLD, unsent=True)


def test_listeners_are_told_at_once() -> None:
    drain, heard = Drain(), list[bool]()
    drain.listeners.add(lambda: heard.append(drain.begun))
    drain.begin(TOLD)
    assert heard == [True]


async def test_what_is_left_when_it_is_cut_ends_with_a_word() -> None:
    drain, codes = told(2), list[Code]()

    async def wait() -> None:
        try:
            with drain.until_cut():
                await anyio.sleep_forever()
        except Failure as failure:
            codes.append(failure.code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert codes == []
        drain.cut()
    await wait()  # and what begins later
    assert codes == [Code.DRAINING] * 3


async def test_what_has_ended_before_is_not_cut() -> None:
    drain = told(1)
    with drain.until_cut():
        await anyio.lowlevel.checkpoint()
    drain.cut()
    await anyio.lowlevel.checkpoint()
