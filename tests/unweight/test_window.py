"""The choice of bases, against trying every one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from unweight.window import choose_bases


def tried(row: NDArray[np.uint8]) -> int:
    """The first base of those that cover most."""
    covered = [sum(base < e <= base + 15 for e in row.tolist()) for base in range(240)]
    return covered.index(max(covered))


def bases_of(*rows: list[int]) -> list[int]:
    return [int(base) for base in choose_bases(np.array(rows, np.uint8))]


def test_a_row_within_one_window_ends_it_with_its_largest() -> None:
    assert bases_of([120, 127, 113], [15, 1, 0], [254, 240, 0]) == [112, 0, 239]


def test_few_outliers_stay_outside() -> None:
    assert bases_of([100, 101, 102, 200], [30, 100, 101, 102]) == [87, 87]


def test_zeros_subnormals_and_what_is_not_finite_count_for_no_window() -> None:
    assert bases_of([0] * 4, [255] * 4, [255, 255, 255, 254], [0, 0, 0, 16]) == [0, 0, 239, 1]


@pytest.mark.parametrize("num_inputs", [1, 2, 15, 100])
def test_no_window_covers_more(num_inputs: int) -> None:
    random = np.random.default_rng(num_inputs)
    for spread in (1, 6, 20, 90):
        middle = random.integers(0, 256, (40, 1))
        drawn = middle + random.normal(0, spread, (40, num_inputs))
        exponents = np.clip(drawn, 0, 255).astype(np.uint8)
        assert list(choose_bases(exponents)) == [tried(row) for row in exponents]
