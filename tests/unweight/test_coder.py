"""Planes and frames of a chunk, against what a person would write."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from unweight.coder import BadFrame, decode, digest, encode, is_worth, join, split
from unweight.samples import trained_like

EVERY = np.arange(1 << 16, dtype=np.uint16)


def frame_of(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


def split_by_hand(word: int) -> tuple[int, int]:
    """Sign and mantissa in a byte, and the exponent, of the 16 letters of a BF16."""
    letters = f"{word:016b}"
    return int(letters[0] + letters[9:], 2), int(letters[1:9], 2)


def test_every_pattern_is_split_and_joined() -> None:
    sm, exponents = split(EVERY)
    assert list(zip(sm.tolist(), exponents.tolist(), strict=True)) == [
        split_by_hand(word) for word in range(1 << 16)
    ]
    assert np.array_equal(join(sm, exponents, np.empty_like(EVERY)), EVERY)


def test_every_pattern_in_every_lane_and_at_the_borders_of_blocks() -> None:
    """A register has at most 64 lanes, and the ends of what is split at a time are odd ones."""
    by_hand = np.array([split_by_hand(word) for word in range(1 << 16)], np.uint8)
    for roll in range(65):
        words = np.roll(EVERY, roll)[: (1 << 16) - roll % 2]
        sm, exponents = split(words)
        assert np.array_equal(np.stack([sm, exponents], 1), by_hand[words])
        assert np.array_equal(join(sm, exponents, np.empty_like(words)), words)


def test_weights_may_lie_at_odd_addresses_and_be_read_only() -> None:
    words = np.frombuffer(b"x" + EVERY.tobytes(), np.uint8)[1:].view("<u2")
    assert not words.flags.aligned
    assert not words.flags.writeable
    sm, exponents = split(words)
    assert np.array_equal(join(sm, exponents, np.empty_like(EVERY)), EVERY)
    assert digest(words) == digest(EVERY)


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


def test_a_frame_is_whole_or_none() -> None:
    """Cut anywhere, or any bit of it another: an error, or (few) the same exponents."""
    exponents = split(trained_like(1, 300, seed=0)[0])[1]
    frame = encode(exponents)
    for kept in range(len(frame)):
        with pytest.raises(BadFrame):
            decode(frame_of(frame[:kept]), exponents.size)
    decoded = 0
    for bit in range(8 * len(frame)):
        damaged = frame_of(frame).copy()
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(decode(damaged, exponents.size), exponents)
            decoded += 1
        except BadFrame:
            pass
    assert decoded < 10  # bits that no decoder reads


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\x28\xb5\x2f\xfd", bytes(64), b"no frame at all",
        struct.pack("<II", 0x184D2A50, 1000) + bytes(1000),  # one that decoders skip
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
        encode(np.zeros(1000, np.uint8))[:-1],
    ],
    ids=["nothing", "magic", "zeros", "text", "skipped", "no size", "cut"],
)  # fmt: skip
def test_what_is_no_frame_of_that_size(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(frame_of(frame), 1000)


@pytest.mark.parametrize("stated", [299, 301, 65_000])
def test_a_frame_that_holds_other_than_it_says(stated: int) -> None:
    """300 bytes; two bytes of its header have that less 256."""
    frame = bytearray(zstandard.ZstdCompressor().compress(b"a" * 300))
    at = frame.index((300 - 256).to_bytes(2, "little"))
    assert decode(frame_of(bytes(frame)), 300).tobytes() == b"a" * 300
    frame[at : at + 2] = (stated - 256).to_bytes(2, "little")
    with pytest.raises(BadFrame):
        decode(frame_of(bytes(frame)), stated)


def test_threads_code_the_same() -> None:
    chunks = [split(row)[1] for row in trained_like(64, 1000, seed=0)]
    alone = [encode(chunk) for chunk in chunks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, chunks)) == alone
        back = list(pool.map(lambda frame: decode(frame_of(frame), 1000), alone))
    assert all(np.array_equal(*pair) for pair in zip(back, chunks, strict=True))


def test_what_is_worth_coding() -> None:
    assert is_worth(trained_like(4, 1024, seed=0).reshape(-1))
    assert not is_worth(trained_like(3, 1024, seed=0).reshape(-1))  # too few
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 16).astype(np.uint16)
    assert not is_worth(noise)
    assert not is_worth(noise[:0])
    assert is_worth(np.zeros(1 << 12, np.uint16))
    assert not is_worth(np.zeros((1 << 12) - 1, np.uint16))
