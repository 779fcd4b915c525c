"""Ids of tokens become text as they come."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge.ask import Ask
from edge.spelling import Spelling, TextStream
from edge.tokenizer import ModelText, load
from tests.edge.conftest import Pair
from tests.edge.test_tokenizer import TEXTS
from tests.fakes.text_assets import byte_level, sentencepiece


def streamed(text: ModelText, ids: list[int], rng: random.Random) -> str:
    """The text of `ids` in random bursts."""
    stream, shown, at = text.stream(), "", 0
    while at < len(ids):
        size = rng.choice([0, 1, 1, 1, 2, 5])
        shown += stream.push(tuple(ids[at : at + size]))
        at += size
    return shown


@pytest.mark.parametrize("seed", range(20))
def test_what_is_pushed_is_what_decoding_at_once_gives(kind: Pair, seed: int) -> None:
    rng = random.Random(seed)
    for text in TEXTS:
        ids = kind.reference(text, add_special_tokens=False)["input_ids"]
        whole = kind.reference.decode(ids, skip_special_tokens=True)
        assert "\ufffd" not in whole
        assert streamed(kind.text, ids, rng) == whole


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(data=st.data())
def test_any_ids_that_are_text_stream_as_they_decode(kind: Pair, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, kind.text.num_ids - 1), max_size=12))
    whole = kind.reference.decode(ids, skip_special_tokens=True)
    shown = streamed(kind.text, ids, random.Random(len(ids)))
    if "\ufffd" not in whole:
        assert shown == whole


def test_what_goes_on_with_a_raw_prompt_keeps_its_first_space() -> None:
    text = load(sentencepiece())
    begin, *ids = text.encode_prompt(Ask(model="m", prompt="dog", raw=True))
    assert text.token_text(ids[0])[0] == " "
    for asked in [Ask(model="m", prompt="The", raw=True), Ask(model="m", token_ids=(begin,))]:
        assert text.stream(asked).push(ids) == " dog"
        one_by_one = text.stream(asked)
        assert "".join(one_by_one.push((one,)) for one in ids) == " dog"
    assert text.stream(Ask(model="m", prompt="The")).push(ids) == "dog"


def test_a_split_character_waits_until_it_is_whole() -> None:
    text, plain = load(byte_level()), Tokenizer.from_str(byte_level().tokenizer_json.decode())
    stream = text.stream()
    ids = plain.encode("ab 𝄞!").ids
    shown = [stream.push((token_id,)) for token_id in ids]
    assert "".join(shown) == "ab 𝄞!"
    assert "" in shown
    assert "\ufffd" not in "".join(shown)


def test_ids_seen_before_read_the_same_wherever_they_come() -> None:
    """Also in the middle of a character, which they then break off."""
    text, plain = load(byte_level()), Tokenizer.from_str(byte_level().tokenizer_json.decode())
    (letter,) = plain.encode("o").ids
    first_byte = plain.encode("𝄞").ids[0]
    for _ in range(2):
        stream = text.stream()
        shown = [stream.push((token_id,)) for token_id in (letter, letter, first_byte, letter)]
        assert shown == ["o", "o", "", "\ufffdo"]


def test_an_unfinished_character_at_the_end_is_never_shown() -> None:
    text, plain = load(byte_level()), Tokenizer.from_str(byte_level().tokenizer_json.decode())
    stream = text.stream()
    ids = plain.encode("ok𝄞").ids
    assert "".join(stream.push((token_id,)) for token_id in ids[:-1]) == "ok"


def test_special_and_unknown_ids_and_ends_of_text_are_not_text(kind: Pair) -> None:
    stream = kind.text.stream()
    assert stream.push((0, 1, 2, 10**9)) == ""


def test_the_first_words_space_is_not_shown_wherever_it_comes() -> None:
    text = load(sentencepiece())
    plain = Tokenizer.from_str(sentencepiece().tokenizer_json.decode())
    ids = plain.encode("the dog", add_special_tokens=False).ids
    stream = text.stream()
    pushes = [(), (1,), *((token_id,) for token_id in ids)]
    assert "".join(map(stream.push, pushes)) == "the dog"


def test_two_streams_know_nothing_of_each_other(kind: Pair) -> None:
    ids = kind.reference("🙂 the dog", add_special_tokens=False)["input_ids"]
    one, two = kind.text.stream(), kind.text.stream()
    shown = ["", ""]
    for token_id in ids:
        shown[0] += one.push((token_id,))
        shown[1] += two.push((token_id,))
    assert shown[0] == shown[1] == kind.reference.decode(ids)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_drops_the_first_words_space_where_one_was_put(scheme: str) -> None:
    tokens = {"▁a": 0, "b": 1, "▁": 2, "▁▁c": 3}
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}
    spec = {"added_tokens": [], "decoder": decoder, "model": {"type": "BPE", "vocab": tokens}}
    reference = Tokenizer.from_str(
        msgspec.json.encode(
            spec | {"model": {"type": "BPE", "vocab": tokens, "merges": []}}
        ).decode()
    )
    rng = random.Random(7)
    for _ in range(200):
        ids = rng.choices(range(4), k=rng.randint(0, 6))
        assert TextStream(Spelling(spec, hidden=())).push(ids) == reference.decode(ids)


def test_one_token_keeps_its_bytes() -> None:
    text, plain = load(byte_level()), Tokenizer.from_str(byte_level().tokenizer_json.decode())
    ids = plain.encode("𝄞").ids
    spelled = "".join(map(text.token_text, ids))
    assert spelled.encode("utf-8", "surrogateescape") == "𝄞".encode()
    assert text.token_text(2) == "<|im_end|>"
    assert text.token_text(10**9) == ""
