"""From ids to pieces: stop strings across tokens, exact usage, log probabilities."""

from __future__ import annotations

import random

import pytest

from edge.ask import Ask, End, Piece, SamplingAsk, Text, TokenLogprob, Usage
from edge.texts import Loaded
from edge.tokenizer import ModelText
from edge.transcript import Transcript
from routing import wire
from tests.fakes.counting_region import ASSETS
from tests.fakes.model_folder import END_ID

LOADED = Loaded(text=ModelText(ASSETS), stop_ids=ASSETS.stop_ids, defaults={})


def transcript(*stops: str, logprobs: int | None = None) -> Transcript:
    ask = Ask(model="m", prompt="p", stops=stops, sampling=SamplingAsk(logprobs=logprobs))
    return Transcript(LOADED, ask, 7)


def finish(count: int, reason: wire.Reason = "length") -> wire.Finish:
    return wire.Finish(reason, wire.Usage(prompt_tokens=7, completion_tokens=count))


def tokens(text: str) -> wire.Tokens:
    """One id a byte."""
    return wire.Tokens(tuple(text.encode()))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


def test_text_then_the_end_with_the_regions_usage() -> None:
    made = transcript()
    assert made.read([wire.Started(3), tokens("AB")]) == [Text(text="AB")]
    assert made.read([tokens("C"), finish(3)]) == [
        Text(text="C"),
        End(reason="length", usage=Usage(prompt_tokens=7, completion_tokens=3)),
    ]
    assert made.ended


def test_plain_tokens_are_text_and_nothing_else() -> None:
    made = transcript()
    assert made.text_of(tokens("AB")) == "AB"
    assert made.text_of(wire.Tokens((END_ID,))) == ""
    scored = wire.Tokens((65,), (wire.Logprob(65, -0.5),))
    assert transcript(logprobs=0).text_of(scored) is None
    assert transcript("x").text_of(tokens("A")) is None


def test_part_of_a_character_is_no_piece() -> None:
    made = transcript()
    euro = "€".encode()
    assert made.read([wire.Tokens(tuple(euro[:1]))]) == []
    assert made.read([wire.Tokens(tuple(euro[1:]))]) == [Text(text="€")]


def test_the_end_of_text_shows_nothing() -> None:
    made = transcript()
    pieces = made.read([tokens("A"), wire.Tokens((END_ID,)), finish(2, "stop")])
    assert pieces == [
        Text(text="A"),
        End(reason="stop", usage=Usage(prompt_tokens=7, completion_tokens=2)),
    ]


def test_usage_ends_with_the_token_that_completes_a_stop() -> None:
    """What the region made beyond it, in the same burst or later, is not the client's."""
    made = transcript("DE")
    pieces = made.read([wire.Started(2), tokens("ABCDEFGH"), finish(8)])
    usage = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2)
    assert pieces == [Text(text="ABC"), End(reason="stop", usage=usage, stop="DE")]
    assert made.ended


def test_what_might_become_a_stop_is_shown_when_it_does_not() -> None:
    made = transcript("DEX")
    assert text_of(made.read([tokens("ABCDE")])) == "ABC"
    pieces = made.read([finish(5)])
    assert text_of(pieces) == "DE"
    assert isinstance(pieces[-1], End)


@pytest.mark.parametrize("stops", [(), ("never",), ("gh", "fghi"), ("\u00fc",), ("i", "n")])
def test_how_tokens_are_split_into_events_changes_nothing(stops: tuple[str, ...]) -> None:
    whole = "abcdefghijkl\u00fcn \U0001f642 end"
    ids = tuple(whole.encode())
    rng = random.Random(3)
    seen = set()
    for _ in range(200):
        made, shown, usage, at = transcript(*stops), "", None, 0
        while not made.ended:
            step = rng.randint(1, 6)
            burst: list[wire.Event] = [
                wire.Tokens(ids[at : at + step]),
                wire.Tokens(ids[at + step : at + 2 * step]),
            ]
            at += 2 * step
            if at >= len(ids):
                burst.append(finish(len(ids)))
            pieces = made.read(burst)
            shown += text_of(pieces)
            if pieces and isinstance(pieces[-1], End):
                usage = pieces[-1].usage.completion_tokens
        seen.add((shown, usage))
    ends = [(whole.index(stop), whole.index(stop) + len(stop)) for stop in stops if stop in whole]
    start, end = min(ends, key=lambda ends: ends[1], default=(len(whole), len(whole)))
    assert seen == {(whole[:start], len(whole[:end].encode()))}


def test_logprobs_go_with_their_tokens_and_none_with_the_end() -> None:
    made = transcript("C", logprobs=1)
    entries = tuple(wire.Logprob(one, -0.5, ((one, -0.5),)) for one in (65, 66, 67, 68))
    [text, end] = made.read([wire.Tokens((65, 66, 67, 68), entries)])
    assert isinstance(text, Text)
    assert [entry.text for entry in text.logprobs] == ["A", "B", "C"]
    assert isinstance(end, End)
    made = transcript(logprobs=0)
    last = wire.Tokens((65, END_ID), (wire.Logprob(65, -1.0), wire.Logprob(END_ID, -2.0)))
    [text, end] = made.read([last, finish(2, "stop")])
    assert text == Text(text="A", logprobs=(TokenLogprob(text="A", logprob=-1.0),))
