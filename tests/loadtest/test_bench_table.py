from __future__ import annotations

import pytest

from loadtest.bench.measure import Prefill, Served, summarise
from loadtest.bench.rounds import Round, notes, peers_table
from loadtest.bench.streams import Answered
from loadtest.bench.table import markdown, number, with_part
from tests.loadtest.figures import level


def test_numbers_have_three_digits_that_count() -> None:
    assert [number(x) for x in (0.694, 20.06, 1535.4, 0.0)] == ["0.69", "20.1", "1,535", "0.00"]


def test_a_part_of_a_file_is_replaced_and_the_rest_stays() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nz\n"
    assert with_part(text, "x", "new\n") == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nz\n"
    assert with_part(with_part(text, "x", "1\n"), "x", "old\n") == text


@pytest.mark.parametrize(
    "text", ["", "<!-- x: begin -->\n", "<!-- x: end -->\n<!-- x: begin -->\n"]
)
def test_a_file_without_both_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="x: begin"):
        with_part(text, "x", "new\n")


def test_a_table_is_as_wide_as_its_heads() -> None:
    assert markdown(["", "n"], [["a", "1"]]) == "|  | n |\n|---|---:|\n| a | 1 |\n"


def test_a_level_counts_tokens_of_all_streams_and_what_ended_early() -> None:
    def answered(sent: float, ended: float, tokens: int) -> Answered:
        return Answered(
            sent=sent, texts=(1.0, 2.0), ended=ended, prompt_tokens=9, completion_tokens=tokens
        )

    level = summarise([answered(0.0, 3.0, 5), answered(0.5, 5.0, 3)], 2, 5, 0.25)
    assert level.output_rate == 8 / 5
    assert level.num_short == 1
    assert level.decode_rate == (4 / 2 + 2 / 4) / 2
    assert (level.ttft_p50_ms, level.ttft_p99_ms) == (500.0, 1000.0)


def measured(server: str, rate: float, number: int, *, ours: bool = False) -> Round:
    prefills = (Prefill(prompt_tokens=512, rate=100 * rate, requests=1),)
    return Round(
        server=server,
        version="1",
        ours=ours,
        round=number,
        served=Served(levels=(level(rate=rate, num_short=1 if ours else 0),), prefills=prefills),
        start_s=rate,
        peak_bytes=None if number else 5_000_000,
    )


def test_ours_is_set_against_the_best_peer_in_each_column() -> None:
    rounds = [
        *(measured("ours", rate, at, ours=True) for at, rate in enumerate((30.0, 20.0, 10.0))),
        *(measured("slow", rate, at) for at, rate in enumerate((4.0, 5.0, 6.0))),
        *(measured("fast", rate, at) for at, rate in enumerate((9.0, 10.0, 11.0))),
    ]
    lines = peers_table(rounds).splitlines()
    assert lines[2].startswith("| ours | 20.0 (10.0-30.0) | 2,000 (1,000-3,000) | 20.0 ")
    assert lines[2].endswith("| 5.00 |")
    # twice the best rate, and four times the shortest start: there less is better
    assert lines[5] == "| ours / best peer | 2.00x | 2.00x | 4.00x | 1.00x |"
    assert "Rounds: 3;" in notes(rounds)[0]
    assert notes(rounds)[1] == "ours: 3 answers ended early."
    assert notes(rounds)[2].endswith("5 % of a core.")
