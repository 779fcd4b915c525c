import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.stops import StopText


def through(stops: tuple[str, ...], pushes: list[str]) -> tuple[str, int | None]:
    """What shows of the pushes, and which of them completed a stop."""
    text = StopText(stops)
    shown = ""
    for at, push in enumerate(pushes):
        shown += text.push(push)
        if text.hit:
            return shown, at
    return shown + text.finish(), None


def expected(stops: tuple[str, ...], text: str) -> tuple[str, int | None]:
    """The same by trying every place: what shows, and how long the text is that holds the stop."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], end
    return text, None


def test_text_without_a_stop_passes_as_it_comes() -> None:
    text = StopText(("END",))
    assert text.push("Hello") == "Hello"
    assert text.push(", world") == ", world"
    assert not text.hit


def test_what_may_become_a_stop_waits_until_it_cannot() -> None:
    text = StopText(("\n\nUser:",))
    assert text.push("Yes.\n") == "Yes."
    assert text.push("\nUse") == ""
    assert text.push("ful") == "\n\nUseful"
    assert not text.hit


def test_a_stop_split_over_three_pushes_ends_the_text_at_the_third() -> None:
    assert through(("<end>",), ["one <", "en", "d> two"]) == ("one ", 2)


def test_after_a_stop_nothing_shows() -> None:
    text = StopText(("x",))
    assert text.push("axb") == "a"
    assert text.hit == "x"
    assert text.push("c") == ""
    assert text.finish() == ""


def test_what_is_held_at_the_end_is_shown() -> None:
    assert through(("abc",), ["xab"]) == ("xab", None)


def test_a_stop_inside_a_longer_one_counts_first() -> None:
    assert through(("abcd", "bc"), ["xabcd"]) == ("xa", 0)


def test_of_stops_complete_together_the_longest_is_cut() -> None:
    assert through(("c", "bc", "abc"), ["xab", "c"]) == ("x", 1)


def test_a_stop_that_begins_like_itself_is_found() -> None:
    assert through(("aab",), list("aaab")) == ("a", 3)


def test_a_stop_that_ends_two_longer_beginnings_is_found() -> None:
    assert through(("acb", "bacc", "c"), ["bac"]) == ("ba", 0)


def test_no_stops_hold_nothing() -> None:
    text = StopText(())
    assert text.push("anything") == "anything"
    assert text.finish() == ""


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3).map(tuple),
    pushes=st.lists(st.text("ab🙂", max_size=5), max_size=8),
)
def test_what_shows_does_not_depend_on_the_pushes(
    stops: tuple[str, ...], pushes: list[str]
) -> None:
    shown, end = expected(stops, "".join(pushes))
    at = None
    if end is not None:
        lengths = [len("".join(pushes[: n + 1])) for n in range(len(pushes))]
        at = next(n for n, length in enumerate(lengths) if length >= end)
    assert through(stops, pushes) == (shown, at)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_walk_with_long_stops(seed: int) -> None:
    rng = random.Random(seed)
    stops = tuple("".join(rng.choices("ab", k=rng.randint(6, 12))) for _ in range(4))
    text = "".join(rng.choices("ab", k=1000))
    cuts = sorted(rng.sample(range(1, 1000), 200))
    pushes = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 1000], strict=True)]
    assert through(stops, pushes)[0] == expected(stops, text)[0]
