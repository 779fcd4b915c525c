"""Drawing ids: the numbers, the order of equals, the filters against plain Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from infire.kernels.draw import Filters, draw, draw_filtered, largest, uniform

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def splitmix64(seed: int, index: int) -> int:
    """In numpy's wrapping integers, as the C code at prng.di.unimi.it/splitmix64.c."""

    def mix(z: np.uint64) -> np.uint64:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        gamma = np.uint64(0x9E3779B97F4A7C15)
        return int(mix(mix(np.uint64(seed)) + np.uint64(index + 1) * gamma))


def test_numbers_are_those_of_splitmix64() -> None:
    chance = random.Random(0)
    for _ in range(200):
        seed, index = chance.getrandbits(64), chance.getrandbits(20)
        assert uniform(seed, index) == (splitmix64(seed, index) >> 32) / 2**32


def test_numbers_never_change() -> None:
    """Streams that pass between regions of different versions go on with the same numbers."""
    numbers = [uniform(1, 0), uniform(1, 1), uniform(2, 0), uniform(-1, 0)]
    assert [int(number * 2**32) for number in numbers] == [
        3220144176,
        1599417572,
        1091840041,
        2776070187,
    ]


@pytest.mark.parametrize("of", ["index", "seed"])
def test_numbers_are_even_along_indices_and_along_seeds(of: str) -> None:
    numbers = [uniform(9, n) if of == "index" else uniform(n, 9) for n in range(20_000)]
    counts, _ = np.histogram(numbers, 100, (0, 1))
    assert chi_square(counts.tolist(), [200.0] * 100) < limit(99)
    # Nor does one say anything of the next.
    pairs, _, _ = np.histogram2d(numbers[:-1], numbers[1:], 10, ((0, 1), (0, 1)))
    assert chi_square(pairs.ravel().tolist(), [199.99] * 100) < limit(99)


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_come_in_order_and_of_equals_the_lowest_id(device: str) -> None:
    chance = random.Random(2)
    values = [[chance.choice((-1e30, -2.5, -0.5, 0.0, 0.5, 2.5, 1e30)) for _ in range(90)]]
    expected = sorted(range(90), key=lambda n: (-values[0][n], n))
    for count in (0, 1, 7, 64, 90):
        assert largest(torch.tensor(values, device=device), count).tolist() == [expected[:count]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_is_where_the_sum_first_exceeds_its_share(device: str) -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], device=device)
    shares = [0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-32]
    numbers = torch.tensor(shares, dtype=torch.float64, device=device)
    assert draw(weights.expand(6, -1), numbers).tolist() == [1, 1, 3, 3, 4, 4]


def test_a_row_of_zeros_draws_an_id_all_the_same() -> None:
    assert draw(torch.zeros(1, 5), torch.tensor([0.5], dtype=torch.float64)).tolist() == [4]


# --- filters ----------------------------------------------------------------------------------


def kept(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
    """The ids that may be drawn, in plain Python."""
    order = sorted(range(len(probabilities)), key=lambda n: (-probabilities[n], n))
    order = order[: top_k or None]
    limit = top_p * sum(probabilities[n] for n in order)
    heavy, mass = [], 0.0
    for n in order:
        if heavy and top_p < 1 and mass >= limit:
            break
        heavy.append(n)
        mass += probabilities[n]
    least = min_p * probabilities[order[0]]
    return [n for n in heavy if n == order[0] or probabilities[n] >= least]


def drawn(
    rows: Tensor, number: float, top_k: int, top_p: float, min_p: float, width: int = 256
) -> list[int]:
    count = len(rows)
    filters = Filters(
        top_k=torch.full((count,), top_k, device=rows.device),
        top_p=torch.full((count,), top_p, dtype=torch.float64, device=rows.device),
        min_p=torch.full((count,), min_p, dtype=torch.float64, device=rows.device),
    )
    numbers = torch.full((count,), number, dtype=torch.float64, device=rows.device)
    return draw_filtered(rows, numbers, filters, width=width).tolist()


FOUR = [0.15, 0.5, 0.05, 0.3]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "expected"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3}),
        (1, 1.0, 0.0, {1}),
        (2, 1.0, 0.0, {1, 3}),
        (9, 1.0, 0.0, {0, 1, 2, 3}),
        (0, 0.0, 0.0, {1}),
        (0, 0.49, 0.0, {1}),
        (0, 0.51, 0.0, {1, 3}),
        (0, 0.81, 0.0, {0, 1, 3}),
        (0, 1.0, 0.29, {0, 1, 3}),
        (0, 1.0, 0.31, {1, 3}),
        (0, 1.0, 1.0, {1}),
        # Of the two likeliest, 0.5 / 0.8 = 0.625 of the sum is the first's.
        (2, 0.62, 0.0, {1}),
        (2, 0.63, 0.0, {1, 3}),
        (3, 0.9, 0.5, {1, 3}),
    ],
)
def test_what_each_filter_keeps(top_k: int, top_p: float, min_p: float, expected: set[int]) -> None:
    assert set(kept(FOUR, top_k, top_p, min_p)) == expected
    rows = torch.tensor([FOUR])
    found = {drawn(rows, number / 100, top_k, top_p, min_p)[0] for number in range(100)}
    assert found == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 3, 60, 256])
@pytest.mark.parametrize("sharpness", [0.0, 0.3, 3.0])
def test_filters_and_draws_are_those_of_plain_python(
    sharpness: float, width: int, device: str
) -> None:
    """Whatever is looked at first; flat rows keep nearly all, and hold many equals."""
    chance = random.Random(4)
    torch.manual_seed(4)
    logits = (torch.randn(1, 500) * sharpness).round(decimals=1)
    probabilities = logits.softmax(-1)
    exact = probabilities[0].tolist()
    for _ in range(40):
        top_k = chance.choice((0, 1, 5, 80, 400))
        top_p = chance.choice((1.0, 0.999, 0.9, 0.5, 0.1))
        min_p = chance.choice((0.0, 0.05, 0.9))
        number = chance.random()
        ids = sorted(kept(exact, top_k, top_p, min_p))
        share, passed = number * sum(exact[n] for n in ids), 0.0
        for expected in ids:
            passed += exact[expected]
            if passed > share:
                break
        found = drawn(probabilities.to(device), number, top_k, top_p, min_p, width)
        assert found == [expected], (top_k, top_p, min_p, number)


def test_a_row_does_not_care_for_its_neighbours() -> None:
    torch.manual_seed(5)
    rows = (torch.randn(30, 900) * torch.linspace(0.1, 8, 30)[:, None]).softmax(-1)
    together = drawn(rows, 0.4, 0, 0.95, 0.0)
    assert together == [drawn(row[None], 0.4, 0, 0.95, 0.0)[0] for row in rows]
    assert together[::-1] == drawn(rows.flip(0), 0.4, 0, 0.95, 0.0)


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


def limit(freedom: int) -> float:
    """What chance exceeds once in about 30,000 times: 4 standard deviations."""
    return freedom + 4 * (2 * freedom) ** 0.5
