"""Wider floats to the bits of bfloat16. Knows no file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even; NaN stays NaN."""
    words = values.view(np.uint32)
    nearest = (words + (0x7FFF + (words >> 16 & 1))) >> 16
    return np.where(np.isnan(values), words >> 16 | 0x40, nearest).astype(np.uint16)
