"""Which 15 neighbouring exponents a row of weights is written in. Knows exponents, not layouts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 15  # exponents a 4-bit code can name; the sixteenth code is zero
LARGEST_BASE = 254 - WINDOW  # exponent 255 is Inf and NaN, and must stay outside


def choose_bases(exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The base of every row: the window base + 1 .. base + 15 holds most of its normal weights.

    exponents: (rows, K) uint8, the biased exponent field. 0 (zeros and subnormals) and 255 (Inf and
    NaN) count for no window. Of windows that hold equally many the lowest is taken.
    """
    highest = exponents.max(axis=1)
    lowest = (exponents - np.uint8(1)).min(axis=1)  # less one, so that 0 comes last: 255
    bases: NDArray[np.uint8] = np.maximum(highest, WINDOW) - np.uint8(WINDOW)
    spread = np.flatnonzero((lowest < bases) | (highest > LARGEST_BASE + WINDOW))
    # Few rows of trained weights spread over more than one window, and counting costs more than
    # all the rest of the packing.
    if spread.size:
        bases[spread] = _best_covered(exponents[spread])
    return bases


def _best_covered(exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    num_rows = exponents.shape[0]
    row_starts = np.arange(num_rows, dtype=np.intp)[:, np.newaxis] * 256
    counts = np.bincount((exponents + row_starts).ravel(), minlength=num_rows * 256)
    up_to = counts.reshape(num_rows, 256).cumsum(axis=1)  # weights with this exponent or a lower
    covered = up_to[:, WINDOW : WINDOW + LARGEST_BASE + 1] - up_to[:, : LARGEST_BASE + 1]
    best: NDArray[np.intp] = covered.argmax(axis=1)
    return best.astype(np.uint8)
