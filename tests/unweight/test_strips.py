"""The layouts, against a reading of them that goes weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from unweight.check import check
from unweight.strips import (
    MAX_EXCEPTION_SHARE,
    Incompressible,
    U12Strips,
    bf16_bytes,
    pack_bf16,
    pack_u12,
    rows_u12,
    u12_bytes,
    unpack_bf16,
    unpack_u12,
)

SHAPES = [(1, 1), (1, 576), (15, 17), (16, 8), (17, 15), (33, 100), (63, 63), (20, 576)]
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def pack_any(weights: NDArray[np.uint16]) -> U12Strips:
    """Packed whether it pays or not."""
    return pack_u12(weights, max_exception_share=1, max_size_share=100)


def gaussian(*shape: int, seed: int = 0) -> NDArray[np.uint16]:
    """Normal weights of another scale in every row, as trained ones are, cut to BF16."""
    random = np.random.default_rng(seed)
    scales = random.lognormal(-4, 0.4, (shape[0], 1))
    values = (random.normal(size=shape) * scales).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def u12_by_hand(strips: U12Strips, n: int, k: int) -> int:
    """A weight, by the offsets that the README gives."""
    num_groups = -(-strips.num_inputs // 8)
    s, i, g, j, p = n // 16, n % 16, k // 8, k % 8 // 2, k % 2
    start = (s * num_groups + g) * 192
    sm = int(strips.data[start + 32 * j + 2 * i + p])
    word_at = start + 128 + 2 * (2 * i + p)
    word = int(strips.data[word_at]) + 256 * int(strips.data[word_at + 1])
    code = word >> (4 * j) & 15
    exponent = int(strips.base[n]) + code if code else 0
    for e in range(strips.ptr[s], strips.ptr[s + 1]):
        if strips.exceptions["k"][e] == k and strips.exceptions["row"][e] == i:
            assert (code, sm) == (0, 0)
            return int(strips.exceptions["value"][e])
    return (sm >> 7) << 15 | exponent << 7 | sm & 127


def of_one_exponent() -> NDArray[np.uint16]:
    """Row e holds the 256 patterns of exponent e: nearly all of them get a code."""
    return (PATTERNS << 8 & 0x8000 | PATTERNS >> 8 << 7 | PATTERNS & 0x7F).reshape(256, 256)


def of_all_exponents() -> NDArray[np.uint16]:
    """Every row holds patterns of all exponents: nearly all of them are exceptions."""
    return np.random.default_rng(3).permutation(PATTERNS).reshape(256, 256)


@pytest.mark.parametrize("patterns", [of_one_exponent(), of_all_exponents()])
def test_every_pattern_survives_in_every_slot(patterns: NDArray[np.uint16]) -> None:
    assert np.array_equal(np.sort(patterns.ravel()), PATTERNS)
    for row in range(16):
        for k in range(8):
            weights = np.roll(patterns, (row, k), axis=(0, 1))
            assert np.array_equal(unpack_u12(pack_any(weights)), weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_12_bit_weights_are_where_the_layout_says(shape: tuple[int, int]) -> None:
    weights = gaussian(*shape)
    random = np.random.default_rng(1)
    some = random.random(shape) < 0.05
    weights[some] = random.integers(0, 1 << 16, int(some.sum()))
    strips = pack_any(weights)
    check(strips)
    for n, k in np.ndindex(*shape):
        assert u12_by_hand(strips, n, k) == weights[n, k], (n, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_weights_are_where_the_layout_says(shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(2).integers(0, 1 << 16, shape, dtype=np.uint16)
    packed = pack_bf16(weights).view("<u2")
    num_pairs = -(-shape[1] // 8) * 4
    expected = np.zeros_like(packed)  # what no weight fills is +0
    for n, k in np.ndindex(*shape):
        expected[((n // 16 * num_pairs + k // 2) * 16 + n % 16) * 2 + k % 2] = weights[n, k]
    assert np.array_equal(packed, expected)
    assert np.array_equal(unpack_bf16(packed.view(np.uint8), *shape), weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_known_before_packing(shape: tuple[int, int]) -> None:
    strips = pack_any(np.random.default_rng(4).integers(0, 1 << 16, shape, dtype=np.uint16))
    sizes = u12_bytes(*shape, strips.exceptions.size)
    arrays = strips.data, strips.base, strips.ptr, strips.exceptions
    assert [array.nbytes for array in arrays] == [
        sizes.data,
        sizes.base,
        sizes.ptr,
        sizes.exceptions,
    ]
    assert strips.num_bytes == sizes.total
    assert pack_bf16(gaussian(*shape)).nbytes == bf16_bytes(*shape)


def test_a_lone_weight_is_padded_with_zeros() -> None:
    strips = pack_any(np.array([[0xBF80]], np.uint16))  # -1: exponent 127, so base 112, code 15
    assert strips.data[0] == 0x80
    assert strips.data[128] == 15
    assert np.count_nonzero(strips.data) == 2
    assert list(strips.base) == [112] + [0] * 15
    assert list(strips.ptr) == [0, 0]


def test_zeros_keep_their_sign_and_are_no_exceptions() -> None:
    weights = gaussian(20, 30)
    weights[:, ::3] = 0
    weights[5, 1::3] = 0x8000
    weights[7] = 0
    weights[8] = 0x8000
    strips = pack_u12(weights)
    assert strips.exceptions.size == 0
    assert np.array_equal(unpack_u12(strips), weights)


def test_what_no_window_may_hold_is_listed_by_input_then_row() -> None:
    weights = np.full((32, 9), 0x3F80, np.uint16)  # 1
    weights[3, 8] = 0x0001  # the smallest subnormal
    weights[2, 8] = 0x807F  # minus the largest subnormal
    weights[9, 0] = 0x7F80  # Inf
    weights[16, 4] = 0xFFC1  # a NaN with a payload
    weights[31, 4] = 0x7F81  # another, signalling
    strips = pack_any(weights)
    assert list(strips.ptr) == [0, 3, 5]
    assert [tuple(record) for record in strips.exceptions.tolist()] == [
        (0, 9, 0x7F80),
        (8, 2, 0x807F),
        (8, 3, 0x0001),
        (4, 0, 0xFFC1),
        (4, 15, 0x7F81),
    ]
    assert np.array_equal(unpack_u12(strips), weights)


def test_a_row_of_outliers_has_a_window_of_its_own() -> None:
    weights = gaussian(48, 100)
    weights[17] = (gaussian(1, 100) & 0x807F) | 200 << 7
    weights[18] = (gaussian(1, 100) & 0x807F) | 1 << 7
    strips = pack_u12(weights)
    assert list(strips.base[16:19]) == [strips.base[16], 185, 0]
    assert np.array_equal(unpack_u12(strips), weights)


def test_some_rows_in_any_order() -> None:
    weights = gaussian(70, 63)
    weights[40, 62] = 0x7F80
    rows = np.array([69, 0, 40, 41, 40])
    assert np.array_equal(rows_u12(pack_any(weights), rows), weights[rows])


def test_threads_and_blocks_change_no_byte() -> None:
    weights = gaussian(1000, 700)  # six blocks
    weights[::100, 5] = 0x7F80
    alone = pack_u12(weights)
    assert alone.exceptions.size >= 10
    together = pack_u12(weights, threads=3)
    for name in ("data", "base", "ptr", "exceptions"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert np.array_equal(pack_bf16(weights), pack_bf16(weights, threads=3))
    assert np.array_equal(unpack_u12(alone), weights)
    check(alone)


def test_strided_and_read_only_weights_are_packed_and_left_alone() -> None:
    weights = gaussian(48, 128)[:, ::2]
    weights.flags.writeable = False
    before = weights.copy()
    assert np.array_equal(unpack_u12(pack_u12(weights)), before)
    assert np.array_equal(unpack_bf16(pack_bf16(weights), 48, 64), before)
    assert np.array_equal(weights, before)


def test_what_a_kernel_loads_starts_on_a_cache_line() -> None:
    for shape in SHAPES:
        assert pack_bf16(gaussian(*shape)).ctypes.data % 64 == 0
        assert pack_any(gaussian(*shape)).data.ctypes.data % 64 == 0


def test_too_many_exceptions_are_refused() -> None:
    weights = np.full((64, 250), 0x3F80, np.uint16)
    allowed = int(MAX_EXCEPTION_SHARE * weights.size)
    weights.reshape(-1)[:allowed] = 0x0001
    assert pack_u12(weights).exceptions.size == allowed == 64
    weights.reshape(-1)[allowed] = 0x0001
    with pytest.raises(Incompressible, match="over 64 exceptions in 16000 weights"):
        pack_u12(weights)
    with pytest.raises(Incompressible):
        pack_u12(of_all_exponents(), threads=2)


def test_a_matrix_too_narrow_to_save_anything_is_refused() -> None:
    with pytest.raises(Incompressible, match="216 bytes for 256 of BF16"):
        pack_u12(np.full((16, 8), 0x3F80, np.uint16))  # 192 + 16 + 8
    assert pack_u12(np.full((16, 24), 0x3F80, np.uint16)).exceptions.size == 0
