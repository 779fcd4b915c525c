"""Who is let in to wait, by the time that it will take. The clock is a number."""

from __future__ import annotations

from heapq import heappop, heappush
from random import Random

import pytest

from origin_gpu.waits import CALM_S, CROWD_S, LEAST_IN_CROWD_S, LEAST_WAIT_S, Line, Turn
from routing.errors import Code, Failure


def refused(line: Line, now: float, priority: int = 0) -> Failure:
    with pytest.raises(Failure) as caught:
        line.enter(priority, now)
    assert caught.value.code is Code.NO_CAPACITY
    return caught.value


def taught(gap_s: float, *, answer_s: float = 0.0, max_wait_s: float = 10.0) -> Line:
    """A line at time 0 in which one has started every `gap_s`, and nobody waits."""
    line = Line(max_wait_s)
    for n in range(-200, 0):
        line.enter(0, n * gap_s).start((n + 1) * gap_s)
        line.answered(answer_s)
    return line


def test_what_is_not_known_refuses_nobody() -> None:
    line = Line()
    assert [line.enter(0, 0.0) for _ in range(1000)]
    assert line.num_waiting == 1000
    assert line.expected_s(0, 5.0) == 0.0
    assert line.room(5.0) is None


def test_the_first_of_all_teaches_nothing() -> None:
    """It may have waited for an engine to compile its kernels."""
    line = Line()
    line.enter(0, 0.0).start(60.0)
    line.enter(0, 60.0)
    assert line.expected_s(0, 60.1) == 0.0


def test_as_many_wait_as_start_in_the_time_that_a_wait_may_take() -> None:
    line = taught(0.25)  # one a quarter of a second, and short answers: a second may be waited
    assert line.bound_s(0.0) == LEAST_WAIT_S
    turns = [line.enter(0, 0.0) for _ in range(5)]  # nobody, then 1, 2, 3, 4 are ahead
    assert line.expected_s(0, 0.0) == pytest.approx(1.25)
    assert line.room(0.0) == 0
    failure = refused(line, 0.0)
    assert failure.detail == "1.2 s to wait, of 1.0 s at most"
    assert failure.retry_after_s == 1.0
    for n, turn in enumerate(turns[:4], 1):  # and no more than a moment's, for a while
        turn.start(n / 4)
        assert line.room(n / 4) == (1 if n == 4 else 0)
    line.enter(0, 1.0)
    refused(line, 1.0)


def test_a_crowd_that_does_not_end_waits_less_until_it_is_calm() -> None:
    line = taught(0.1)
    before = line.enter(0, 0.0)
    for n in range(1, 31):  # somebody always waits
        turn = line.enter(0, n / 10)
        before.start(n / 10)
        before = turn
    assert CROWD_S < 3.0
    assert line.bound_s(3.0) == LEAST_IN_CROWD_S
    before.leave()
    assert line.bound_s(3.0) == LEAST_WAIT_S  # nobody was refused
    slow = taught(30.0)
    slow.enter(0, 0.0)
    refused(slow, 0.0)
    assert slow.bound_s(0.1) == LEAST_IN_CROWD_S
    assert slow.bound_s(CALM_S - 0.1) == LEAST_IN_CROWD_S


def test_long_answers_may_be_waited_for_longer_up_to_a_bound() -> None:
    assert taught(0.25, answer_s=6.0).bound_s(0.0) == pytest.approx(3.0)
    assert taught(0.25, answer_s=600.0).bound_s(0.0) == 10.0
    assert taught(0.25, answer_s=600.0, max_wait_s=2.0).bound_s(0.0) == 2.0


def test_where_rows_are_idle_only_the_longest_wait_is_a_bound() -> None:
    line = taught(0.25)
    assert [line.enter(0, 0.0, idle=True) for _ in range(41)]
    assert line.room(0.0, idle=True) == 0
    with pytest.raises(Failure):
        line.enter(0, 0.0, idle=True)


def test_who_comes_when_nobody_waits_is_let_in_however_slow_it_is() -> None:
    line = taught(30.0)
    line.enter(0, 0.0)
    assert refused(line, 0.0).retry_after_s == pytest.approx(29.0)


def test_a_line_that_does_not_move_is_longer_than_it_was() -> None:
    line = taught(0.1)
    line.enter(0, 0.0)
    assert line.expected_s(0, 0.0) == pytest.approx(0.1)
    assert line.expected_s(0, 50.0) == pytest.approx(5.0, rel=0.2)
    refused(line, 50.0)


def test_the_time_without_anybody_waiting_does_not_count() -> None:
    line = taught(0.25)
    line.enter(0, 1000.0).start(1000.25)
    line.enter(0, 2000.0)
    assert line.expected_s(0, 2000.0) == pytest.approx(0.25)


def test_higher_priority_counts_only_those_ahead_of_it() -> None:
    line = taught(0.25)
    for _ in range(5):
        line.enter(0, 0.0)
    refused(line, 0.0)
    line.enter(1, 0.0)
    assert line.expected_s(1, 0.0) == pytest.approx(0.25)


def test_work_for_idle_times_waits_for_nobody_else() -> None:
    line = taught(0.25)
    line.enter(-1, 0.0)
    line.enter(-1, 0.0)  # its own kind it may wait for
    turn = line.enter(0, 0.0)
    assert "over -1" in refused(line, 0.0, -1).detail
    turn.leave()
    line.enter(-1, 0.0)


def test_who_has_begun_elsewhere_is_let_in() -> None:
    line = taught(30.0)
    line.enter(0, 0.0)
    line.enter(0, 0.0, begun=True)
    assert line.num_waiting == 2


def test_without_a_bound_nobody_is_refused() -> None:
    line = taught(30.0, max_wait_s=0.0)
    assert [line.enter(0, 0.0) for _ in range(100)]
    assert line.room(0.0) is None


def test_a_turn_ends_once() -> None:
    line = taught(0.25)
    turn = line.enter(0, 0.0)
    turn.leave()
    turn.leave()
    turn.start(1.0)
    assert line.num_waiting == 0


class Server:
    """So many rows, whose answers take 0.2 to 0.6 s, behind a line."""

    def __init__(self, slots: int, random: Random) -> None:
        self.line = Line()
        self.waits: list[float] = []
        self.busy_s = 0.0
        self.num_refused = 0
        self._slots = slots
        self._random = random
        self._queue: list[tuple[float, Turn]] = []  # who waits, in order
        self._ends: list[tuple[float, float]] = []  # of those who run, and how long each took

    def ask(self, now: float) -> None:
        self._catch_up(now)
        try:
            turn = self.line.enter(0, now, idle=len(self._ends) < self._slots)
        except Failure:
            self.num_refused += 1
            return
        if len(self._ends) < self._slots:
            self._run(turn, now)
        else:
            self._queue.append((now, turn))

    def _catch_up(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            at, took = heappop(self._ends)
            self.line.answered(took)
            if self._queue:
                came, turn = self._queue.pop(0)
                self.waits.append(at - came)
                self._run(turn, at)

    def _run(self, turn: Turn, now: float) -> None:
        took = self._random.uniform(0.2, 0.6)
        turn.start(now)
        heappush(self._ends, (now + took, took))
        self.busy_s += took


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slots", [1, 4])
def test_at_three_times_capacity_who_is_let_in_waits_no_longer_and_nothing_idles(
    seed: int, slots: int
) -> None:
    random = Random(seed)
    server, now, until = Server(slots, random), 0.0, 200.0
    capacity = slots / 0.4
    while now < until:
        now += random.expovariate(3 * capacity)
        server.ask(now)
    steady = sorted(server.waits[len(server.waits) // 10 :])
    gap_s = 1 / capacity
    assert steady[int(0.95 * len(steady))] <= 3 * max(LEAST_IN_CROWD_S, gap_s)
    assert server.busy_s >= 0.9 * slots * until
    assert server.num_refused >= 0.5 * 3 * capacity * until
