"""BF16 words as a byte of sign and mantissa, a 4-bit code and exceptions. Knows no layout.

What `README.md` says of codes: 1 to 15 is an exponent, `base + code`; 0 is +0 or -0; what neither
can say is an exception, with code 0 and a zero byte in its place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unweight.window import WINDOW


def encode(
    words: NDArray[np.uint16], bases: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.intp]]:
    """Of words (R, K) in the bases of their rows (R,): sign-mantissa bytes (R, K), codes (R, K) of
    0 to 15, and where the exceptions lie in the flattened words, rising."""
    sm = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    codes = (words >> 7).astype(np.uint8)  # exponents, until the base is taken off
    codes -= bases[:, np.newaxis]
    outside = np.flatnonzero(codes - np.uint8(1) >= WINDOW)  # what is below wraps to the top
    codes.reshape(-1)[outside] = 0
    exceptional = outside[words.reshape(-1)[outside] & 0x7FFF != 0]
    sm.reshape(-1)[exceptional] = 0
    return sm, codes, exceptional


def decode(
    sm: NDArray[np.uint8], codes: NDArray[np.uint8], bases: NDArray[np.uint8]
) -> NDArray[np.uint16]:
    """The words (R, K) that `encode` was given, with +0 where an exception is."""
    exponents = (codes + bases[:, np.newaxis]) * (codes > 0)
    words = sm.astype(np.uint16)
    words += (words & 0x80) * np.uint16(255)  # the sign to the top: 0x80 * 256 in all
    words |= exponents.astype(np.uint16) << 7
    return words
