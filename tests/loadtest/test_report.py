"""The table and the matrix, from samples small enough to check by eye."""

from __future__ import annotations

import io
import math
import random

import pytest
from rich.console import Console, RenderableType

from loadtest.report import lines_of, matrix_of, percentile, summarise, table_of
from loadtest.samples import Sample


def answer(client: str, region: str, sent: float, *texts: float) -> Sample:
    return Sample(
        client=client,
        region=region,
        sent=sent,
        ended=texts[-1],
        texts=texts,
        completion_tokens=len(texts),
    )


SAMPLES = [
    answer("Europe", "weur", 0.0, 0.1, 0.2, 0.4),
    answer("Europe", "weur", 1.0, 1.3, 1.4),
    answer("North America", "enam", 0.0, 0.2, 0.3),
    answer("North America", "weur", 2.0, 2.2, 2.3),
    Sample(client="Europe", region="", sent=3.0, ended=4.0, error="HTTP 503: no room"),
]


def shown(part: RenderableType) -> list[list[str]]:
    """The words of each line."""
    screen = Console(width=120, file=io.StringIO(), record=True)
    screen.print(part)
    return [line.split() for line in screen.export_text().splitlines() if line.strip()]


def test_failures_count_as_requests_and_give_no_times() -> None:
    report = summarise(SAMPLES)
    assert (report.requests, report.num_errors) == (5, 1)
    assert report.ttft_s == pytest.approx([0.1, 0.2, 0.2, 0.3])
    assert report.gaps_s == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.2])
    assert report.completion_tokens == 9
    assert report.total_rate == pytest.approx(9 / 4.0)
    assert lines_of(report) == [
        "5 requests in 4.0 s, 1 failed",
        "9 tokens, 2.2 tokens/s in total",
        "  1 x HTTP 503: no room",
    ]


def test_the_matrix_says_who_was_served_where() -> None:
    title, head, europe, america = shown(matrix_of(summarise(SAMPLES)))
    assert title == ["Served", "by"]
    assert head == ["client", "(none)", "enam", "weur"]
    assert europe == ["Europe", "1", "0", "2"]
    assert america == ["North", "America", "0", "1", "1"]


def test_the_table_shows_milliseconds_and_the_slow_end_of_rates() -> None:
    _, _, ttft, itl, rates = shown(table_of(summarise(SAMPLES)))
    assert ttft[-4:] == ["200.0", "300.0", "300.0", "4"]
    assert itl[-4:] == ["100.0", "200.0", "200.0", "5"]
    assert rates[-4:] == ["10.0", "6.7", "6.7", "4"]


def test_nothing_measured_shows_dashes() -> None:
    report = summarise([])
    assert shown(table_of(report))[2][-4:] == ["-", "-", "-", "0"]
    assert lines_of(report)[0] == "0 requests in 0.0 s, 0 failed"
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 1000])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.95, 0.99])
def test_a_percentile_is_the_least_value_that_enough_values_do_not_exceed(
    count: int, share: float
) -> None:
    rng = random.Random(count)
    values = sorted(rng.choice([1.0, 2.0, 3.0, 5.0, 8.0]) for _ in range(count))
    found = percentile(values, share)
    assert sum(value <= found for value in values) >= share * count
    assert sum(value < found for value in values) < share * count
