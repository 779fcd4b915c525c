"""Vocabularies for grammars, and answers drawn from nothing but their masks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from infire.grammar import Templates
from infire.masks import Masks
from infire.plan import Row, SlotOpen
from infire.request import Grammar, SamplingParams
from infire.vocabulary import Vocabulary, read_vocabulary
from tests.fakes.model_folder import SPECIAL, make_counting_folder

BYTES_SIZE = 256 + len(SPECIAL)  # ids of the counting folder: 256 bytes, then special tokens
_CLOSING = b'"}]'


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = list(tokens)
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """The longest token first: it is asked for what a grammar forces to be said."""
        ids = []
        while found := max((it for it in self.tokens if text.startswith(it)), key=len, default=b""):
            ids.append(self.tokens.index(found))
            text = text[len(found) :]
        return ids


def vocabulary_of(tokens: Sequence[bytes]) -> Vocabulary:
    """An id for each, and a last one that ends a text."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Tokens([*tokens, b"<end>"])))
    return Vocabulary(tokenizer=tokenizer, size=len(tokens) + 1)


def bytes_vocabulary(folder: Path) -> Vocabulary:
    """Of the counting model: an id is a byte."""
    return read_vocabulary(make_counting_folder(folder), BYTES_SIZE)


def opened(
    grammar: Grammar, *, slot: int = 0, output: Sequence[int] = (), stop_ids: Sequence[int] = ()
) -> SlotOpen:
    return SlotOpen(
        slot=slot,
        token_ids=(0, *output),
        num_prompt=1,
        sampling=SamplingParams(max_tokens=1000, seed=0, stop_ids=tuple(stop_ids)),
        grammar=grammar,
    )


def row(slot: int = 0) -> Row:
    return Row(slot=slot, start=0, num_new=1, ids=(0,))


def allowed(mask: np.ndarray[Any, np.dtype[np.int32]] | None) -> list[int]:
    assert mask is not None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def masks_of(templates: Templates, num_slots: int = 4) -> Masks:
    return Masks(templates, num_slots, templates.vocabulary.size)


def draw_bytes(matcher: LLMatcher, vocabulary: Vocabulary, seed: int, most: int = 4000) -> bytes:
    """A text of single bytes, each one of those that may follow; what closes something is likelier.

    Fails if there is no end, or none within `most` bytes.
    """
    chance = random.Random(seed)
    mask = np.zeros(vocabulary.num_words, np.int32)
    text = bytearray()
    while len(text) < most:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert not matcher.is_error(), (bytes(text), matcher.get_error())
        some = [it for it in allowed(mask) if it < 256]
        if matcher.is_accepting() and (not some or chance.random() < 0.5):
            return bytes(text)
        assert some, (bytes(text), "nothing may follow, and it is no answer yet")
        closing = [it for it in some if it in _CLOSING]
        byte = chance.choice(closing if closing and chance.random() < 0.4 else some)
        assert matcher.consume_token(byte)
        text.append(byte)
    raise AssertionError(f"no end: {bytes(text[:200])!r}")
