"""The tiles of GPU kernels, against a reading of them that goes weight by weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unweight.check import (
    BadPointers,
    BadStrips,
    BaseOutOfRange,
    OutOfOrder,
    OutsideMatrix,
    WrongSize,
    check_tiles,
)
from unweight.strips import Incompressible
from unweight.tiles import U12Tiles, pack_tiles, tiles_bytes, unpack_tiles

SHAPES = [(1, 1), (63, 100), (64, 128), (65, 129), (64, 1030), (130, 2047), (200, 384)]


def gaussian(*shape: int, seed: int = 0) -> NDArray[np.uint16]:
    random = np.random.default_rng(seed)
    scales = random.lognormal(-4, 0.4, (shape[0], 1))
    values = (random.normal(size=shape) * scales).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def pack_any(weights: NDArray[np.uint16], threads: int = 1) -> U12Tiles:
    return pack_tiles(weights, threads=threads, max_exception_share=1, max_size_share=1e9)


def by_hand(tiles: U12Tiles, n: int, k: int) -> int:
    """A weight, by the offsets that the README gives."""
    block, tile, chunk = n // 64, k // 128, k // 1024
    place = block * -(-tiles.num_inputs // 1024) + chunk
    for word in tiles.exceptions[tiles.ptr[place] : tiles.ptr[place + 1]]:
        if int(word) & 0xFFFF == n % 64 << 10 | k % 1024:
            return int(word) >> 16
    slot, w = k % 128 // 16, k % 16
    data = tiles.words.reshape(-1).view(np.uint8)
    at = (block * tiles.words.shape[1] + tile) * 12288
    word = (n % 64 * 16 + w) * 4
    sm = int(data[at + slot // 4 * 4096 + word + slot % 4])
    code = int(data[at + 8192 + word + slot // 2]) >> slot % 2 * 4 & 15
    if len(tiles.base) == len(tiles.words) * 64:
        base = int(tiles.base[n])
    else:
        base = tiles.first_base + (int(tiles.base[n // 2]) >> n % 2 * 4 & 15)
    return (sm & 0x80) << 8 | (base + code << 7 if code else 0) | sm & 0x7F


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_lies_where_the_readme_says(shape: tuple[int, int]) -> None:
    weights = gaussian(*shape)
    weights[0, 0] = 0x4480
    tiles = pack_any(weights)
    random = np.random.default_rng(1)
    for _ in range(300):
        n, k = int(random.integers(shape[0])), int(random.integers(shape[1]))
        assert by_hand(tiles, n, k) == weights[n, k]
    assert by_hand(tiles, 0, 0) == 0x4480
    assert (unpack_tiles(tiles) == weights).all()


def test_every_pattern_in_every_slot() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    shifted = [np.roll(patterns, shift) for shift in range(0, 128, 16)]  # another slot each
    shuffled = np.random.default_rng(2).permutation(patterns)
    for weights in (*shifted, shuffled):
        for shape in ((64, 1024), (512, 128), (1024, 64)):
            assert (unpack_tiles(pack_any(weights.reshape(shape))) == weights.reshape(shape)).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 140),
    k=st.integers(1, 1300),
    kind=st.integers(0, 3),
)
def test_round_trips(seed: int, n: int, k: int, kind: int) -> None:
    random = np.random.default_rng(seed)
    weights = {
        0: gaussian(n, k, seed=seed),
        1: random.integers(0, 1 << 16, (n, k), dtype=np.uint16),
        2: np.zeros((n, k), np.uint16),
        3: gaussian(n, k, seed=seed) * (random.random((n, k)) < 0.1),
    }[kind].astype(np.uint16)
    tiles = pack_any(weights)
    assert (unpack_tiles(tiles) == weights).all()
    nibbles = len(tiles.base) < len(tiles.words) * 64
    assert tiles.num_bytes == tiles_bytes(n, k, tiles.exceptions.size, nibbles=nibbles)


def test_threads_change_nothing() -> None:
    weights = gaussian(700, 1500)
    one, three = pack_any(weights), pack_any(weights, threads=3)
    for name in ("words", "base", "ptr", "exceptions"):
        assert (getattr(one, name) == getattr(three, name)).all(), name


def test_a_row_of_zeros_asks_for_no_base() -> None:
    weights = gaussian(64, 256)
    weights[5], weights[63] = 0, 0x8000
    tiles = pack_tiles(weights)
    assert len(tiles.base) == 32  # nibbles still do
    assert (unpack_tiles(tiles) == weights).all()


def test_rows_far_apart_have_bases_in_bytes() -> None:
    weights = gaussian(64, 256)
    weights[1] -= 40 << 7  # 2 ** -40 of what it was, as of a token that was never trained
    tiles = pack_tiles(weights)
    assert (len(tiles.base), tiles.first_base) == (64, 0)
    assert (unpack_tiles(tiles) == weights).all()


def test_what_does_not_pay_is_refused() -> None:
    random = np.random.default_rng(3)
    with pytest.raises(Incompressible, match="exceptions in 64 x 128 weights"):
        pack_tiles(random.integers(0, 1 << 16, (64, 128), dtype=np.uint16))
    with pytest.raises(Incompressible, match="bytes for"):
        pack_tiles(gaussian(64, 64))  # half of every tile would be padding


def test_a_layer_of_a_large_model_is_under_75_1_percent() -> None:
    weights = gaussian(512, 4096)
    assert pack_tiles(weights).num_bytes <= 0.751 * weights.nbytes


def swapped(tiles: U12Tiles) -> NDArray[np.uint32]:
    first = tiles.exceptions[:2]
    return np.concatenate([first[::-1], tiles.exceptions[2:]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_packed_passes(shape: tuple[int, int]) -> None:
    check_tiles(pack_any(gaussian(*shape)))


HOSTILE: list[tuple[type[BadStrips], Any]] = [
    (WrongSize, lambda t: {"words": t.words[:1]}),
    (WrongSize, lambda t: {"words": t.words.astype(np.uint64)}),
    (WrongSize, lambda t: {"base": t.base[1:]}),
    (WrongSize, lambda t: {"ptr": t.ptr[:-1]}),
    (WrongSize, lambda t: {"ptr": t.ptr.astype(np.int64)}),
    (WrongSize, lambda t: {"num_outputs": 0}),
    (WrongSize, lambda t: {"num_inputs": t.num_inputs + 128}),
    (WrongSize, lambda t: {"exceptions": t.exceptions[::2]}),
    (BaseOutOfRange, lambda t: {"first_base": 239}),
    (BaseOutOfRange, lambda t: {"first_base": -1}),
    (BadPointers, lambda t: {"ptr": t.ptr + np.int32(1)}),
    (BadPointers, lambda t: {"exceptions": t.exceptions[:-1]}),
    (
        BadPointers,
        lambda t: {"ptr": np.where(np.arange(t.ptr.size) == 1, 1 << 20, t.ptr).astype("<i4")},
    ),
    (OutsideMatrix, lambda t: {"exceptions": t.exceptions | np.uint32(0x3FF)}),
    (OutOfOrder, lambda t: {"exceptions": swapped(t)}),
    (OutOfOrder, lambda t: {"exceptions": np.repeat(t.exceptions[:1], t.exceptions.size)}),
]


@pytest.mark.parametrize(("error", "change"), HOSTILE)
def test_what_would_lead_a_kernel_astray_is_named(error: type[BadStrips], change: Any) -> None:
    weights = gaussian(100, 1100)
    weights[2, 3:5], weights[70, 1050:1053], weights[99, 1] = 0x4480, 0x4490, 0x4490
    tiles = pack_any(weights)
    check_tiles(tiles)
    with pytest.raises(error):
        check_tiles(replace(tiles, **change(tiles)))
