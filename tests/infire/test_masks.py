"""Masks of tiny vocabularies against every text that matches, and what becomes of rows."""

from __future__ import annotations

import itertools
import json
import random
import re

import msgspec
import pytest

from infire import masks as masks_module
from infire.grammar import BadGrammar, Templates
from infire.plan import RowResult
from infire.request import Grammar
from tests.infire.grammars import allowed, masks_of, opened, row, vocabulary_of

TOKENS = [b"a", b"b", b"c", b"ab", b"ba", b"aab", b"cc", b"abc", b"bb", b"caa"]
END = len(TOKENS)
LONGEST = 6  # characters of any text that matches one of these
PATTERNS = [
    "abc|aabb|c{3}",
    "(ab|ba){1,3}",
    "a?b?c?",
    "(a|ab)(c|bcc)?",
    "[abc]{2,4}",
    "a{0,4}(b|c)",
    "(aab|aa|b)?cc",
]


def texts_of(pattern: str) -> set[bytes]:
    """All that match."""
    every = (
        "".join(letters)
        for count in range(LONGEST + 1)
        for letters in itertools.product("abc", repeat=count)
    )
    return {text.encode() for text in every if re.fullmatch(pattern, text)}


def followers(texts: set[bytes], said: bytes) -> list[int]:
    """By hand: the ids with which some text goes on after `said`, and the end where it is one."""
    ids = [
        n for n, token in enumerate(TOKENS) if any(text.startswith(said + token) for text in texts)
    ]
    return [*ids, END] if said in texts else ids


def is_forced(texts: set[bytes], said: bytes) -> bool:
    """Whether there is but one way on: then it must be spelled as the tokenizer would."""
    ways = {text[len(said) : len(said) + 1] for text in texts if text.startswith(said)}
    return len(ways) == 1


def check_mask(found: list[int], texts: set[bytes], said: bytes) -> None:
    expected = followers(texts, said)
    if is_forced(texts, said):
        assert found
        assert set(found) <= set(expected)
    else:
        assert found == expected, said


@pytest.fixture(scope="module")
def templates() -> Templates:
    return Templates(vocabulary_of(TOKENS))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_brute_force(templates: Templates, pattern: str) -> None:
    """Along 40 random ways through each language, at every place of them."""
    texts = texts_of(pattern)
    assert texts
    chance = random.Random(pattern)
    for _ in range(40):
        masks = masks_of(templates)
        mask = masks.open(opened(Grammar("regex", pattern), stop_ids=[END]))
        said = b""
        while True:
            masks.fill([row()])
            check_mask(allowed(mask), texts, said)
            token_id = chance.choice(allowed(mask))
            assert masks.settle([row()], [RowResult((token_id,))]) == [RowResult((token_id,))]
            if token_id == END:
                break
            said += TOKENS[token_id]
        assert said in texts


def test_a_choice_is_each_of_its_texts(templates: Templates) -> None:
    masks = masks_of(templates)
    grammar = Grammar("choice", json.dumps(["ab", "abc", "cc"]))
    mask = masks.open(opened(grammar, stop_ids=[END]))
    said = []
    for token_id in (3, 2):  # "ab", "c"
        masks.fill([row()])
        said.append(allowed(mask))
        masks.settle([row()], [RowResult((token_id,))])
    masks.fill([row()])
    assert said == [[0, 2, 3, 6, 7], [2, END]]
    assert allowed(mask) == [END]


def test_where_nothing_can_follow_only_the_end_may(templates: Templates) -> None:
    masks = masks_of(templates)
    mask = masks.open(opened(Grammar("regex", "ab"), output=[3], stop_ids=[END]))
    masks.fill([row()])
    assert allowed(mask) == [END]
    assert masks.settle([row()], [RowResult((END,))]) == [RowResult((END,))]


def test_the_request_says_which_ids_end_it(templates: Templates) -> None:
    """Another id than the vocabulary's own; before the end it may not come, though it is a text."""
    masks = masks_of(templates)
    mask = masks.open(opened(Grammar("regex", "b*"), output=[1], stop_ids=[8]))
    masks.fill([row()])
    assert allowed(mask) == [1, 8]
    mask = masks.open(opened(Grammar("regex", "[bc]{5}"), output=[1], stop_ids=[8]))
    masks.fill([row()])
    assert allowed(mask) == [1, 2, 6]


@pytest.mark.parametrize("pattern", ["ab", "ab|ba"])
def test_without_an_id_for_the_end_the_row_ends_by_itself(
    templates: Templates, pattern: str
) -> None:
    masks = masks_of(templates)
    mask = masks.open(opened(Grammar("regex", pattern)))
    masks.fill([row()])
    assert END not in allowed(mask)
    assert masks.settle([row()], [RowResult((0,))]) == [RowResult((0,))]
    masks.fill([row()])
    assert allowed(mask) == [1]
    assert masks.settle([row()], [RowResult((1,))]) == [RowResult((1,), ended=True)]


def test_without_an_id_for_the_end_what_can_go_on_does(templates: Templates) -> None:
    masks = masks_of(templates)
    mask = masks.open(opened(Grammar("regex", "a+")))
    for _ in range(10):
        masks.fill([row()])
        assert allowed(mask) == [0]
        assert masks.settle([row()], [RowResult((0,))]) == [RowResult((0,))]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_slot_that_is_opened_again_goes_on_where_it_was(
    templates: Templates, pattern: str
) -> None:
    chance = random.Random(pattern)
    masks = masks_of(templates)
    grammar = Grammar("regex", pattern)
    first = masks.open(opened(grammar, stop_ids=[END]))
    said: list[int] = []
    while True:
        masks.fill([row()])
        again = masks.open(opened(grammar, slot=3, output=said, stop_ids=[END]))
        masks.fill([row(3)])
        assert allowed(again) == allowed(first)
        token_id = chance.choice(allowed(first))
        masks.settle([row()], [RowResult((token_id,))])
        if token_id == END:
            return
        said.append(token_id)


@pytest.mark.parametrize("most", [3, 100])
def test_rows_are_masked_each_by_its_own(
    templates: Templates, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several threads and on one; only what samples is touched."""
    monkeypatch.setattr(masks_module, "_PARALLEL", most)
    patterns = [PATTERNS[n % len(PATTERNS)] for n in range(12)]
    masks = masks_of(templates, 16)
    found = [
        masks.open(opened(Grammar("regex", pattern), slot=n + 2, stop_ids=[END]))
        for n, pattern in enumerate(patterns)
    ]
    masks.open(opened(Grammar("regex", "c"), slot=15))
    untouched = masks.open(opened(Grammar("regex", "c"), slot=14))
    masks.fill([row(15), *[row(n) for n in range(14)]])  # 0 and 1 have no grammar
    for pattern, mask in zip(patterns, found, strict=True):
        check_mask(allowed(mask), texts_of(pattern), b"")
    assert untouched is not None
    assert set(untouched.tolist()) == {-1}


def test_what_does_not_match_ends_its_own_row(templates: Templates) -> None:
    masks = masks_of(templates)
    masks.open(opened(Grammar("regex", "ab"), output=[2]))
    masks.open(opened(Grammar("regex", "ab"), slot=1))
    rows = [row(0), row(1), row(2)]
    masks.fill(rows)
    results = masks.settle(rows, [RowResult((0,)), RowResult((0,)), RowResult((9,))])
    assert results[0] == RowResult(fault="the answer so far does not match it")
    assert results[1:] == [RowResult((0,)), RowResult((9,))]


def test_a_vocabulary_that_cannot_say_it_ends_the_row(templates: Templates) -> None:
    masks = masks_of(templates)
    masks.open(opened(Grammar("regex", "ax|bx")))
    masks.fill([row()])
    assert masks.settle([row()], [RowResult((0,))]) == [RowResult((0,))]
    masks.fill([row()])
    (result,) = masks.settle([row()], [RowResult((0,))])
    assert not result.ids
    assert result.fault


def test_full_tables_are_emptied_once(templates: Templates) -> None:
    """What others have put there is no fault of a request that goes on; its own is."""
    own = Templates(templates.vocabulary)
    masks = masks_of(own)
    grammar = Grammar("regex", "(ab){1,4}")
    mask = masks.open(opened(grammar, stop_ids=[END]))
    masks.fill([row()])
    masks.settle([row()], [RowResult((3,))])
    state = masks._states[0]
    first = own.known(grammar)
    assert state.matcher is not None
    state.matcher.consume_token(2)  # breaks it, as full tables do
    masks.fill([row()])
    check_mask(allowed(mask), texts_of(grammar.source), b"ab")
    assert own.known(grammar) not in {None, first}
    assert masks.settle([row()], [RowResult((3,))]) == [RowResult((3,))]
    masks.fill([row()])
    assert masks.settle([row()], [RowResult((END,))]) == [RowResult((END,))]
    state.matcher.consume_token(2)
    masks.fill([row()])
    assert masks.settle([row()], [RowResult((0,))])[0].fault


def test_one_that_takes_too_long_is_refused_from_then_on(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Templates(templates.vocabulary)
    masks = masks_of(own)
    masks.open(opened(Grammar("regex", "ab")))
    masks.open(opened(Grammar("regex", "ba"), slot=1))
    masks.fill([row(1)])
    monkeypatch.setattr(masks_module, "_MOST_S", -1.0)
    masks.fill([row()])
    rows = [row(), row(1)]
    results = masks.settle(rows, [RowResult((0,)), RowResult((1,))])
    assert results == [RowResult(fault="a token takes too long to check"), RowResult((1,))]
    monkeypatch.undo()
    with pytest.raises(BadGrammar, match="too long to check"):
        own.get(Grammar("regex", "ab"))
    own.get(Grammar("regex", "ba"))


def test_a_slot_without_a_grammar_forgets_the_one_before(templates: Templates) -> None:
    masks = masks_of(templates)
    masks.open(opened(Grammar("regex", "ab")))
    bare = msgspec.structs.replace(opened(Grammar("regex", "ab")), grammar=None)
    assert masks.open(bare) is None
    masks.fill([row()])
    assert masks.settle([row()], [RowResult((7,))]) == [RowResult((7,))]


def test_templates_are_kept_while_they_are_in_use(templates: Templates) -> None:
    few = Templates(templates.vocabulary, kept=2)
    first = few.get(Grammar("regex", "a"))
    for letter in "bc":
        few.get(Grammar("regex", letter))
    assert few.known(Grammar("regex", "a")) is first
    few.get(Grammar("regex", "aa"))
    few.get(Grammar("regex", "ab"))
    del first
    assert few.known(Grammar("regex", "a")) is None
    assert few.known(Grammar("regex", "ab")) is not None
