"""What is left for afterwards is done once all has been heard, and in the right turn."""

from __future__ import annotations

import anyio
import pytest

from routing.arrival import afterwards, hand_out


def test_what_is_left_is_done_when_all_is_heard_in_order() -> None:
    done: list[str] = []

    def hear(words: str) -> None:
        for word in words.split():
            afterwards(lambda word=word: done.append(word))  # type: ignore[misc]
            done.append("heard")

    hand_out(hear, "a b")
    assert done == ["heard", "heard", "a", "b"]
    hand_out(hear, "c")
    assert done[4:] == ["heard", "c"]


def test_it_is_done_when_the_hearer_raises() -> None:
    done: list[int] = []

    def hear(number: int) -> None:
        afterwards(lambda: done.append(number))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hand_out(hear, 1)
    assert done == [1]


async def test_elsewhere_it_is_done_in_the_next_turn() -> None:
    done: list[int] = []
    afterwards(lambda: done.append(1))
    assert done == []
    await anyio.lowlevel.checkpoint()
    assert done == [1]
