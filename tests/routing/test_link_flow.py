"""What waits at the ends of a link: credit, merging, patience. By hand, without sockets."""

from __future__ import annotations

import random

import pytest

from routing import wire
from routing.errors import Code
from routing.link_flow import Outbox, Patience
from routing.link_frames import Batch

FINISH = wire.Finish("stop", wire.Usage(prompt_tokens=1, completion_tokens=1))


class Box:
    """An outbox with a limit of 3 periods, and how often it had news."""

    def __init__(self, credit: int) -> None:
        self.news = 0
        self.outbox: Outbox[wire.Event] = Outbox(7, credit, Patience(3, 1), self._on_news)

    def _on_news(self, number: int) -> None:
        assert number == 7
        self.news += 1

    def put_tokens(self, *token_ids: int) -> None:
        for token_id in token_ids:
            self.outbox.put(wire.Tokens((token_id,)))


def test_what_there_is_credit_for_goes_out_as_it_was_put() -> None:
    box = Box(credit=3)
    box.put_tokens(1, 2)
    assert box.outbox.batch() == Batch(7, (wire.Tokens((1,)), wire.Tokens((2,))), ended=False)
    assert box.outbox.batch() is None


def test_beyond_the_credit_tokens_become_one_event() -> None:
    box = Box(credit=2)
    box.put_tokens(1, 2, 3, 4, 5)
    assert box.outbox.batch() == Batch(7, (wire.Tokens((1,)), wire.Tokens((2,))), ended=False)
    box.put_tokens(6)
    assert box.outbox.batch() is None
    box.outbox.grant(5)
    assert box.outbox.batch() == Batch(7, (wire.Tokens((3, 4, 5, 6)),), ended=False)


def test_one_token_alone_needs_no_event() -> None:
    box = Box(credit=2)
    box.put_tokens(5)
    assert box.outbox.lone_id() == 5
    assert box.outbox.lone_id() is None
    box.put_tokens(0)
    assert box.outbox.lone_id() == 0
    box.put_tokens(6)
    assert box.outbox.lone_id() is None  # no credit
    box.outbox.grant(1)
    assert box.outbox.lone_id() == 6


@pytest.mark.parametrize(
    "events",
    [
        [wire.Tokens((1, 2))],
        [wire.Tokens(())],
        [wire.Tokens((1,)), wire.Tokens((2,))],
        [wire.Started(0), wire.Tokens((1,))],
        [wire.Tokens((1,), (wire.Logprob(1, -0.5),))],
        [FINISH],
        [],
    ],
)
def test_what_is_more_or_less_than_one_token_stays_an_event(events: list[wire.Event]) -> None:
    box = Box(credit=9)
    for event in events:
        box.outbox.put(event)
    assert box.outbox.lone_id() is None
    batch = box.outbox.batch()
    assert (batch.events if batch else ()) == tuple(events)


def test_the_last_token_goes_with_the_end() -> None:
    box = Box(credit=9)
    box.put_tokens(1)
    box.outbox.end()
    assert box.outbox.lone_id() is None
    assert box.outbox.batch() == Batch(7, (wire.Tokens((1,)),), ended=True)


def test_logprobs_stay_with_their_tokens() -> None:
    box = Box(credit=0)
    for token_id in (1, 2):
        box.outbox.put(wire.Tokens((token_id,), (wire.Logprob(token_id, -0.5),)))
    box.outbox.grant(1)
    merged = wire.Tokens((1, 2), (wire.Logprob(1, -0.5), wire.Logprob(2, -0.5)))
    assert box.outbox.batch() == Batch(7, (merged,), ended=False)


def test_other_events_never_merge_and_keep_their_place() -> None:
    box = Box(credit=0)
    box.outbox.put(wire.Started(1))
    box.put_tokens(1, 2)
    box.outbox.put(FINISH)
    box.outbox.end()
    box.outbox.grant(2)
    assert box.outbox.batch() == Batch(7, (wire.Started(1), wire.Tokens((1, 2))), ended=False)
    box.outbox.grant(1)
    assert box.outbox.batch() == Batch(7, (FINISH,), ended=True)


def test_the_end_needs_no_credit_once_all_is_said() -> None:
    box = Box(credit=0)
    box.outbox.end()
    assert box.outbox.batch() == Batch(7, (), ended=True)


def test_a_stream_is_stalled_when_something_waits_for_credit_for_too_long() -> None:
    box = Box(credit=1)
    assert not any(box.outbox.stalled() for _ in range(10))  # nothing to say
    box.put_tokens(1, 2)
    assert not any(box.outbox.stalled() for _ in range(10))  # it may go out
    box.outbox.batch()
    assert [box.outbox.stalled() for _ in range(4)] == [False, False, False, True]


def test_any_credit_is_a_sign_of_life() -> None:
    box = Box(credit=0)
    box.put_tokens(1)
    for _ in range(10):
        assert not box.outbox.stalled()
        assert not box.outbox.stalled()
        box.outbox.grant(1)
        box.outbox.batch()
        box.put_tokens(1)


def test_a_stream_that_is_cut_says_so_without_credit_and_nothing_else() -> None:
    box = Box(credit=0)
    box.put_tokens(1, 2)
    fault = wire.Fault(Code.ABORTED, "stalled")
    box.outbox.cut(fault)
    box.put_tokens(3)
    assert box.outbox.batch() == Batch(7, (fault,), ended=True)


@pytest.mark.parametrize("seed", range(50))
def test_whatever_is_put_granted_and_taken_all_ids_come_out_in_order(seed: int) -> None:
    rng = random.Random(seed)
    box, credit, out = Box(credit=3), 3, []
    put = 0
    for _ in range(300):
        act = rng.random()
        if act < 0.6:
            put += 1
            box.put_tokens(put)
        elif act < 0.8:
            num_events = rng.randrange(1, 4)
            credit += num_events
            box.outbox.grant(num_events)
        elif batch := box.outbox.batch():
            credit -= len(batch.events)
            out += [i for event in batch.events for i in event.ids]  # type: ignore[union-attr]
        assert credit >= 0
        assert len(box.outbox._waiting) <= credit + 1
    box.outbox.end()
    box.outbox.grant(1000)
    last = box.outbox.batch()
    assert last is not None
    assert last.ended
    assert out + [i for event in last.events for i in event.ids] == list(range(1, put + 1))  # type: ignore[union-attr]


def test_credit_with_nothing_to_send_is_no_news() -> None:
    news: list[int] = []
    outbox: Outbox[wire.Event] = Outbox(7, 0, Patience(1.0, 1.0), news.append)
    outbox.grant(1)
    assert news == []
    outbox.put(wire.Tokens((1,)))
    outbox.grant(1)
    assert news == [7, 7]
