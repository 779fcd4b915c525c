"""The breaker: what opens it, what closes it, and that it never lets a dead region be hammered."""

from __future__ import annotations

import random

from routing.health import Breaker, State


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(max_failures=3, cool_down_s=1.0, max_cool_down_s=8.0)
    for _ in range(3):
        breaker = breaker.failed(now)
    return breaker


def test_it_opens_at_the_third_failure_in_a_row() -> None:
    breaker = Breaker(max_failures=3)
    breaker = breaker.failed(0.0).failed(0.0)
    assert breaker.state(0.0) is State.CLOSED
    assert breaker.failed(0.0).state(0.0) is State.OPEN
    assert breaker.succeeded().failed(0.0).failed(0.0).state(0.0) is State.CLOSED


def test_after_the_cool_down_one_probe_goes_through() -> None:
    breaker = opened()
    assert not breaker.admits(0.99)
    assert breaker.wait_s(0.25) == 0.75
    assert breaker.state(1.0) is State.HALF_OPEN
    assert breaker.admits(1.0)
    assert not breaker.called(1.0).admits(1.0)
    assert breaker.called(1.0).succeeded().state(1.0) is State.CLOSED


def test_each_failed_probe_doubles_the_cool_down_up_to_its_limit() -> None:
    breaker, now, waits = opened(), 0.0, []
    for _ in range(6):
        waits.append(breaker.wait_s(now))
        now += waits[-1]
        breaker = breaker.called(now).failed(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_success_forgets_the_backoff() -> None:
    breaker = opened().called(1.0).failed(1.0).called(3.0).succeeded()
    for _ in range(3):
        breaker = breaker.failed(10.0)
    assert breaker.wait_s(10.0) == 1.0


def test_an_abandoned_probe_leaves_the_place_to_another() -> None:
    assert opened().called(1.0).abandoned().admits(1.0)


def test_a_late_failure_of_an_old_call_does_not_prolong_the_cool_down() -> None:
    assert opened().failed(0.9).wait_s(0.9) == opened().wait_s(0.9)


def test_a_thousand_openings_do_not_overflow() -> None:
    breaker, now = opened(), 0.0
    for _ in range(1000):
        now += breaker.wait_s(now)
        breaker = breaker.called(now).failed(now)
    assert breaker.wait_s(now) == 8.0


def test_at_any_mix_of_luck_calls_to_a_failing_region_stay_rare() -> None:
    """Random walk: never two probes at once; while all calls fail, few are made."""
    rng = random.Random(7)
    for _ in range(200):
        breaker, now, out, calls = Breaker(cool_down_s=1.0), 0.0, 0, 0
        dead = rng.random() < 0.5
        for _ in range(300):
            now += rng.expovariate(10)
            if breaker.admits(now) and out < 5:
                if breaker.state(now) is State.HALF_OPEN:
                    assert not breaker.probing
                breaker = breaker.called(now)
                out, calls = out + 1, calls + 1
            if out and rng.random() < 0.7:
                out -= 1
                luck = 1.0 if dead else rng.random()
                breaker = breaker.failed(now) if luck > 0.3 else breaker.succeeded()
            assert breaker.admits(now) == (
                breaker.state(now) is State.CLOSED
                or (breaker.state(now) is State.HALF_OPEN and not breaker.probing)
            )
            assert (breaker.wait_s(now) > 0) == (breaker.state(now) is State.OPEN)
        if dead:  # about 30 s: 3 calls to open it, at most 5 out, then at 1, 3, 7, 15 and 31 s
            assert calls <= 20
        assert breaker.succeeded().admits(now)
