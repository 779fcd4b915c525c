"""Counting: exact in every window, shared by processes, going on without its file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from edge import meter
from edge.limits import Limit, Rule
from edge.meter import Meter
from routing.errors import Code

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted(tmp_path: Path, clock: Clock) -> Iterator[Meter]:
    made = Meter(tmp_path / "limits.sqlite", clock)
    yield made
    made.close()


def rule(name: str, most: float, period: str = "min", bucket: str = "account a") -> Rule:
    return Rule(Limit(name, most, period), bucket)  # type: ignore[arg-type]


def test_the_window_slides(counted: Meter, clock: Clock) -> None:
    rules = [rule("requests", 2)]
    assert [counted.admit(rules)[1] for _ in range(2)] == [None, None]
    clock.now += 30.5
    standings, failure = counted.admit(rules)
    assert standings[0].remaining == 0
    assert failure is not None
    assert (failure.code, failure.retry_after_s) == (Code.RATE_LIMITED, pytest.approx(29.5))
    assert failure.detail == "rate limit of 2 requests a minute reached"
    clock.now += 29.4
    assert counted.admit(rules)[1] is not None
    clock.now += 0.1
    standings, failure = counted.admit(rules)
    assert (failure, standings[0].remaining) == (None, 1)


def test_a_request_that_is_to_come_again_does_not_count(counted: Meter, clock: Clock) -> None:
    """That one, and no other of its window."""
    rules = [rule("requests", 2)]
    first, _ = counted.admit(rules)
    clock.now += 30
    assert counted.admit(rules)[1] is None
    counted.charge([(rules[0], first[0].at)])
    assert counted.admit(rules)[1] is None
    clock.now += 59
    assert counted.admit(rules)[1] is not None


@pytest.mark.parametrize("seed", range(8))
def test_never_more_than_the_limit_in_any_window_and_never_a_refusal_below(
    counted: Meter, clock: Clock, seed: int
) -> None:
    random = Random(seed)
    limits = {"s": random.randint(1, 4), "min": random.randint(3, 40)}
    rules = [rule("requests", most, period) for period, most in limits.items()]
    length = {"s": 1.0, "min": 60.0}
    taken: list[float] = []
    for _ in range(1500):
        clock.now += random.choice([0.0, 0.01, 0.3, random.expovariate(1), 20.0])
        fits = all(
            sum(at > clock.now - length[period] for at in taken) < most
            for period, most in limits.items()
        )
        _, failure = counted.admit(rules)
        assert (failure is None) is fits
        if failure is None:
            taken.append(clock.now)
        else:  # and after the time it says, one more fits, as far as that rule goes
            assert failure.retry_after_s is not None
            assert failure.retry_after_s <= 60.0
    for period, most in limits.items():
        ends = taken
        assert max(sum(end - length[period] < at <= end for at in taken) for end in ends) <= most


def test_a_refusal_by_one_rule_counts_for_none(counted: Meter) -> None:
    tight, wide = rule("requests", 1), rule("requests", 5, "hour")
    counted.admit([wide, tight])
    assert counted.admit([wide, tight])[1] is not None
    (standing,), failure = counted.admit([wide])
    assert (standing.remaining, failure) == (3, None)


def test_buckets_are_apart(counted: Meter) -> None:
    for bucket in ("account a", "account b", "key a"):
        assert counted.admit([rule("requests", 1, bucket=bucket)])[1] is None
        assert counted.admit([rule("requests", 1, bucket=bucket)])[1] is not None


def test_a_limit_of_nothing_lets_nobody_in(counted: Meter) -> None:
    for name in ("requests", "tokens"):
        failure = counted.admit([rule(name, 0)])[1]
        assert failure is not None
        assert failure.retry_after_s is not None


def test_a_days_amount_is_there_again_at_midnight(counted: Meter, clock: Clock) -> None:
    neurons = rule("neurons", 10_000, "day")
    counted.charge([(neurons, 9_999.5)])
    (standing,), failure = counted.admit([neurons])
    assert (standing.remaining, failure) == (0.5, None)
    failure = counted.admit([neurons], [(neurons, 0.5)])[1]
    assert failure is not None
    assert (failure.code, failure.retry_after_s) == (Code.QUOTA, 12 * 3600)
    assert failure.code.meaning.public == 3036
    assert "daily allocation of 10,000 neurons" in failure.detail
    clock.now += 12 * 3600
    assert counted.admit([neurons])[1] is None


def test_spending_is_bound_by_the_month_too(counted: Meter, clock: Clock) -> None:
    month, day = rule("usd", 5, "month"), rule("usd", 3, "day")
    counted.charge([(it, 3.0) for it in (month, day)])
    assert counted.admit([month])[1] is None
    assert "daily allocation of 3.00 USD" in str(counted.admit([month, day])[1])
    clock.now += 86_400
    counted.charge([(it, 2.0) for it in (month, day)])
    failure = counted.admit([month, day])[1]
    assert failure is not None
    assert "monthly allocation of 5.00 USD" in failure.detail
    assert failure.retry_after_s == 2.5 * 86_400  # to the first of December


def test_tokens_of_a_minute_are_a_rate(counted: Meter, clock: Clock) -> None:
    tokens = rule("tokens", 100)
    counted.charge([(tokens, 100.0)])
    clock.now += 15
    failure = counted.admit([tokens])[1]
    assert failure is not None
    assert (failure.code, failure.retry_after_s) == (Code.RATE_LIMITED, 45)


def test_a_clock_that_is_set_back_locks_nobody_out(counted: Meter, clock: Clock) -> None:
    rules = [rule("requests", 2)]
    counted.admit(rules)
    counted.admit(rules)
    clock.now -= 3600
    assert counted.admit(rules)[1] is None


def test_counts_outlive_the_process(tmp_path: Path, clock: Clock) -> None:
    path, rules = tmp_path / "limits.sqlite", [rule("requests", 1)]
    first = Meter(path, clock)
    first.admit(rules)
    first.close()
    second = Meter(path, clock)
    assert second.admit(rules)[1] is not None
    second.close()
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_of_no_use_is_dropped(tmp_path: Path, clock: Clock) -> None:
    path, tokens = tmp_path / "limits.sqlite", rule("tokens", 9, "day")
    first = Meter(path, clock)
    first.admit([rule("requests", 1)], [(tokens, 1.0)])
    first.close()
    clock.now += 50 * 86_400
    second = Meter(path, clock)
    second.admit([rule("requests", 1, bucket="account b")])
    second.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT bucket FROM hits").fetchall() == [
            ("account b requests min",)
        ]
        assert connection.execute("SELECT * FROM spent").fetchall() == []
    connection.close()


def test_without_its_file_it_counts_in_memory_and_comes_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "AGAIN_S", 0.0)
    folder = tmp_path / "limits.sqlite"
    folder.mkdir()  # where the file should be
    counted, rules = Meter(folder, clock), [rule("requests", 1)]
    assert counted.admit(rules)[1] is None
    assert counted.admit(rules)[1] is not None
    folder.rmdir()
    assert counted.admit(rules)[1] is None  # the file knows of none
    assert counted.admit(rules)[1] is not None
    counted.close()


def test_a_file_that_another_keeps_locked_holds_up_nobody_for_long(
    tmp_path: Path, clock: Clock
) -> None:
    path, rules = tmp_path / "limits.sqlite", [rule("requests", 1)]
    counted = Meter(path, clock)
    counted.admit(rules)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert counted.admit(rules)[1] is None  # in memory
    assert counted.admit(rules)[1] is not None
    holder.execute("ROLLBACK")
    holder.close()
    counted.close()


TAKE = """
import sys, time
from pathlib import Path
from edge.limits import Limit, Rule
from edge.meter import Meter
counted = Meter(Path(sys.argv[1]), time.time)
rules = [Rule(Limit("requests", 500, "hour"), "account a")]
print("ready", flush=True)
sys.stdin.readline()
print(sum(counted.admit(rules)[1] is None for _ in range(400)))
"""


def test_processes_share_a_limit_exactly(tmp_path: Path) -> None:
    """Three take what they can of 500 at the same time."""
    words = [sys.executable, "-c", TAKE, str(tmp_path / "limits.sqlite")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    taking = [subprocess.Popen(words, text=True, cwd=ROOT, **pipes) for _ in range(3)]
    for it in taking:
        assert it.stdout is not None
        assert it.stdout.readline() == "ready\n"
    for it in taking:
        assert it.stdin is not None
        it.stdin.write("\n")
        it.stdin.flush()
    counts = [int(it.communicate(timeout=60)[0]) for it in taking]
    assert sum(counts) == 500
