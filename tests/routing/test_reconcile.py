"""Ledgers against journals, worked out by hand."""

from __future__ import annotations

import random

import pytest

from routing.reconcile import Compared, Finding, Missing, Over, Short, Twice, compare, num_made
from routing.usage import JournalRow, LedgerRow
from tests.routing.test_rows import made, told


def findings(
    ledger: list[LedgerRow], journals: list[JournalRow], *, known_from: float = 0.0
) -> list[Finding]:
    return list(
        compare(
            sorted(ledger, key=lambda row: row.request_id),
            sorted(journals, key=lambda row: row.request_id),
            ended_before=100.0,
            known_from=known_from,
            account_of={"t": "acme"}.get,  # type: ignore[arg-type]
            seen=Compared(),
        )
    )


def test_what_agrees_is_no_finding() -> None:
    assert not findings([told("a"), told("b")], [made("b"), made("a")])


def test_a_request_over_two_regions_is_one_row_and_its_parts() -> None:
    parts = [
        made("a", new_tokens=3, outcome="aborted"),
        made("a", region="enam", first_token=3, new_tokens=2, started=10.5),
    ]
    assert not findings([told("a", regions="weur,enam")], parts)


def test_tokens_made_twice_count_once() -> None:
    """The first region had made two more than were heard."""
    parts = [made("a", new_tokens=4, outcome="aborted"), made("a", first_token=2, new_tokens=3)]
    assert num_made(parts) == 5
    assert not findings([told("a")], parts)


def test_who_hung_up_was_told_at_most_what_was_made() -> None:
    left = told("a", outcome="hung_up", whole=False, completion_tokens=3)
    assert not findings([left], [made("a", new_tokens=5, outcome="aborted")])
    assert findings([left], [made("a", new_tokens=2, outcome="aborted")]) == [
        Short(request_id="a", told=3, known=2)
    ]


def test_a_ledger_that_has_less_of_a_whole_answer() -> None:
    assert findings([told("a", completion_tokens=4)], [made("a")]) == [
        Over(request_id="a", told=4, made=5)
    ]


def test_a_killed_front_leaves_a_gap() -> None:
    """Its part is in no journal; the next one's begins behind it."""
    assert findings([told("a")], [made("a", first_token=3, new_tokens=2)]) == [
        Short(request_id="a", told=5, known=2)
    ]
    assert findings([told("a")], []) == [Short(request_id="a", told=5, known=0)]
    assert not findings([told("a", completion_tokens=0, regions="")], [])  # none could be asked


def test_what_journals_have_dropped_is_not_missed() -> None:
    old, new = told("a", started=9.0), told("b", started=30.0)
    assert findings([old, new], [], known_from=20.0) == [Short(request_id="b", told=5, known=0)]
    first_part_dropped = [made("a", first_token=3, new_tokens=2)]
    assert not findings([old], first_part_dropped, known_from=20.0)
    more = [made("a", first_token=3, new_tokens=4)]
    assert findings([old], more, known_from=20.0) == [Over(request_id="a", told=5, made=7)]


def test_a_missing_row_is_made_of_all_its_parts() -> None:
    parts = [
        made("a", new_tokens=3, outcome="aborted", cached_tokens=2, ended=12.0),
        made("a", region="enam", first_token=3, new_tokens=4, started=12.5, ended=14.0),
    ]
    [missing] = findings([told("b")], [*parts, made("b")])
    assert isinstance(missing, Missing)
    assert missing.row == told(
        "a",
        key_id="",
        regions="weur,enam",
        completion_tokens=7,
        cached_tokens=2,
        outcome="length",
        ended=14.0,
        source="journal",
    )


def test_a_missing_row_of_vectors_is_whole() -> None:
    parts = [made("a", new_tokens=0, outcome="lost"), made("a", region="enam", outcome="embedded")]
    [missing] = findings([told("b")], [*parts, made("b")])
    assert isinstance(missing, Missing)
    assert (missing.row.outcome, missing.row.whole) == ("embedded", True)


def test_a_request_that_has_just_ended_is_not_missed_yet() -> None:
    seen = Compared()
    rows = [made("a", ended=99.5)]
    found = compare(
        [], rows, ended_before=99.0, known_from=0, account_of=lambda tenant: "", seen=seen
    )
    assert not list(found)
    assert seen.waiting == 1


def test_what_a_region_made_that_nobody_listened_to_is_neither_more_nor_told() -> None:
    """It was paused, given up at 30, and had made 90 until it noticed; the next one ended at 40.
    Its clock is behind, too."""
    deaf = made("a", new_tokens=90, outcome="aborted", started=50.0, ended=60.0)
    heard = made("a", region="enam", first_token=30, new_tokens=10, outcome="stop")
    assert not findings([told("a", completion_tokens=40)], [deaf, heard])
    [missing] = findings([], [deaf, heard])
    assert isinstance(missing, Missing)
    row = missing.row
    assert (row.completion_tokens, row.outcome, row.regions) == (40, "stop", "weur,enam")
    assert (row.started, row.ended) == (10.0, 60.0)
    anew = made("a", region="enam", new_tokens=40, outcome="stop")
    [missing] = findings([], [deaf, anew])
    assert isinstance(missing, Missing)
    assert (missing.row.completion_tokens, missing.row.outcome) == (40, "stop")


def test_a_front_may_write_its_row_after_the_edge() -> None:
    """Or have been read before."""
    assert not findings([told("a", ended=100.5)], [])


def test_a_request_in_two_ledgers_is_told_and_judged_by_its_edges_own_row() -> None:
    """Added to one while its edge, which writes another, was still at it."""
    guessed, own = told("a", completion_tokens=3, source="journal"), told("a")
    rows = (guessed, own)
    assert findings(list(rows), [made("a")]) == [Twice(request_id="a", rows=rows)]


def test_a_region_that_refused_is_not_said_to_have_spoken() -> None:
    """It was asked first, and made nothing: neither it nor what it had cached is in the row."""
    parts = [
        made("a", new_tokens=0, cached_tokens=0, outcome="no_capacity"),
        made("a", region="enam", cached_tokens=2, started=10.5, outcome="stop"),
    ]
    [missing] = findings([], parts)
    assert isinstance(missing, Missing)
    row = missing.row
    assert (row.regions, row.cached_tokens, row.outcome) == ("enam", 2, "stop")
    assert (row.whole, row.started) == (True, 10.0)


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_over_regions_is_recognised(seed: int) -> None:
    """However a request is broken off and resumed, with whatever was made and not heard: its row
    agrees; without it, one is made that has every token."""
    rng = random.Random(seed)
    ledger, journals = [], []
    for number in range(30):
        request_id, total, heard = f"{number:02}", rng.randint(0, 40), 0
        while heard < total and rng.random() < 0.6:
            new = rng.randint(0, total - heard)
            unheard = rng.randint(0, min(3, total - heard - new))
            journals.append(
                made(request_id, first_token=heard, new_tokens=new + unheard, outcome="aborted")
            )
            heard += new
        last = total - heard
        journals.append(made(request_id, first_token=heard, new_tokens=last, started=20.0))
        ledger.append(told(request_id, completion_tokens=total))
    rng.shuffle(journals)
    assert not findings(ledger, journals)
    lost = [row for row in ledger if rng.random() < 0.3]
    found = findings([row for row in ledger if row not in lost], journals)
    rebuilt = {it.request_id: it.row.completion_tokens for it in found if isinstance(it, Missing)}
    assert rebuilt == {row.request_id: row.completion_tokens for row in lost}
    assert len(found) == len(lost)
