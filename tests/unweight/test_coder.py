"""Planes and frames of a chunk, against what a person would write."""

from __future__ import annotations

import numpy as np
import pytest

from unweight.coder import BadFrame, decode, digest, encode, is_worth, join, split
from unweight.samples import trained_like

EVERY = np.arange(1 << 16, dtype=np.uint16)


def test_every_pattern_is_split_and_joined() -> None:
    sm, exponents = split(EVERY)
    for word in (0x0000, 0x8000, 0x3FC0, 0xBF40, 0x7F80, 0xFF81, 0x0001, 0xFFFF):
        assert sm[word] == (word >> 15) << 7 | word & 0x7F
        assert exponents[word] == word >> 7 & 0xFF
    assert np.array_equal(sm, (EVERY >> 15) << 7 | EVERY & 0x7F)
    assert np.array_equal(exponents, EVERY >> 7 & 0xFF)
    assert np.array_equal(join(sm, exponents, np.empty_like(EVERY)), EVERY)


@pytest.mark.parametrize("size", [1, 63, 1000, 32_767, 32_769, 100_001])
def test_any_number_of_weights(size: int) -> None:
    words = np.resize(np.roll(EVERY, size), size)
    sm, exponents = split(words)
    frame = np.frombuffer(encode(exponents), np.uint8)
    again = join(sm, decode(frame, size), np.empty_like(words))
    assert np.array_equal(again, words)
    assert digest(again) == digest(words)


def test_exponents_take_near_their_entropy() -> None:
    _, exponents = split(trained_like(128, 1024, seed=0).reshape(-1))
    shares = np.bincount(exponents) / exponents.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    assert entropy < 8 * len(encode(exponents)) / exponents.size < entropy + 0.06


def test_the_same_exponent_throughout_takes_next_to_nothing() -> None:
    frame = encode(np.full(1 << 17, 120, np.uint8))
    assert len(frame) < 100
    assert (decode(np.frombuffer(frame, np.uint8), 1 << 17) == 120).all()


def test_a_frame_of_another_size_is_not_decoded() -> None:
    frame = np.frombuffer(encode(np.zeros(1 << 20, np.uint8)), np.uint8)
    for size in (1, (1 << 20) - 1, (1 << 20) + 1):
        with pytest.raises(BadFrame, match=f"1048576 exponents for {size}"):
            decode(frame, size)


@pytest.mark.parametrize("at", [0, 4, 9, -1])
def test_a_damaged_frame_is_not_decoded(at: int) -> None:
    _, exponents = split(trained_like(4, 1024, seed=0).reshape(-1))
    frame = np.frombuffer(encode(exponents), np.uint8).copy()
    frame[at] ^= 0x55
    with pytest.raises(BadFrame):
        decode(frame, exponents.size)
    with pytest.raises(BadFrame):
        decode(frame[:3], exponents.size)


def test_what_is_worth_coding() -> None:
    assert is_worth(trained_like(4, 1024, seed=0).reshape(-1))
    assert not is_worth(trained_like(3, 1024, seed=0).reshape(-1))  # too few
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 16).astype(np.uint16)
    assert not is_worth(noise)
