"""What a draft costs, by hand."""

from __future__ import annotations

import pytest

from infire.step_times import StepTimes


def learned(*steps: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for num_tokens, seconds in steps:
        times.learn(num_tokens, seconds)
    return times


def test_before_anything_is_known_a_draft_costs_a_tenth_of_a_step() -> None:
    assert StepTimes().price(1, 4) == pytest.approx(0.1)
    # Four rows take 1.3 of a step, in which they make four tokens.
    assert StepTimes().price(4, 12) == pytest.approx(0.1 / 1.3 * 4)


def test_measured_steps_count() -> None:
    times = learned(*[(4, 0.020), (16, 0.065)] * 3)
    assert times.price(4, 12) == pytest.approx((65 / 20 - 1) / 12 * 4)  # 0.75: 3 of 4 must be right
    assert times.price(1, 1) == pytest.approx(0.1)  # from the nearest size, as assumed
    free = learned(*[(1, 0.010), (5, 0.010)] * 3)
    assert free.price(1, 4) == 0


def test_a_size_is_known_from_its_third_step_on() -> None:
    times = learned(*[(1, 0.010)] * 3, (5, 0.100), (5, 0.100))
    assert times.price(1, 4) == pytest.approx(0.1)
    times.learn(5, 0.100)
    assert times.price(1, 4) == pytest.approx(9 / 4)


def test_steps_that_others_made_longer_count_for_little() -> None:
    times = learned(*[(1, 0.010)] * 3, (5, 0.900), *[(5, 0.012)] * 8, (5, 0.900))
    assert times.price(1, 4) < 0.2


def test_what_was_long_ago_is_forgotten() -> None:
    times = learned(*[(5, 0.100)] * 3, *[(1, 0.010)] * 513)
    assert times.price(1, 4) == pytest.approx(0.1)
    times.learn(5, 0.010)  # as if it were the first
    assert times.price(1, 4) == pytest.approx(0.1)
