"""The overload bench: its table by hand, and a short run of all of it."""

from __future__ import annotations

import os

import anyio
import pytest

from loadtest.bench.overload.report import at, table
from loadtest.bench.overload.run import KINDS, LOADS, Setting, Window, measure


def test_a_row_is_the_median_of_rounds_with_the_least_and_the_most() -> None:
    windows = [
        Window(
            kind="bounded",
            load=3.0,
            ttft_s=[0.1 * n, 0.2 * n],
            total_s=[1.0, 2.0],
            refused_s=[0.004 * n] * 6,
        )
        for n in (1, 3, 2)
    ]
    windows.append(Window(kind="bounded", load=1.0, ttft_s=[0.05], total_s=[1.0]))
    heads, _, usual, crowd = table(windows).strip().splitlines()
    assert heads.count("|") == usual.count("|") == crowd.count("|") == 9
    assert [it.strip() for it in usual.split("|")[1:-1]] == [
        *("bounded, 1 x", "1", "100 %", "50.0 (50.0-50.0)", "50.0 (50.0-50.0)"),
        *("1,000 (1,000-1,000)", "-", "-"),
    ]
    assert [it.strip() for it in crowd.split("|")[1:-1]] == [
        *("bounded, 3 x", "24", "25 %", "400 (200-600)", "400 (200-600)"),
        *("2,000 (2,000-2,000)", "8.00 (4.00-12.0)", "8.00 (4.00-12.0)"),
    ]


def test_the_value_below_which_a_share_lies() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (at(values, 0.5), at(values, 0.99), at([7.0], 0.99)) == (51.0, 100.0, 7.0)


def test_capacity_is_rows_by_the_time_of_an_answer() -> None:
    setting = Setting(rows=16, step_s=0.02, output_tokens=50, window_s=1, rounds=1)
    assert (setting.answer_s, setting.capacity) == (1.0, 16.0)


@pytest.mark.system
@pytest.mark.slow
def test_a_short_run_measures_every_kind_at_every_load() -> None:
    setting = Setting(rows=2, step_s=0.02, output_tokens=10, window_s=1.5, rounds=1)
    windows = anyio.run(measure, setting, dict(os.environ))
    assert {(it.kind, it.load) for it in windows} == {(k, load) for k in KINDS for load in LOADS}
    assert all(it.ttft_s for it in windows)
