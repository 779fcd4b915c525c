"""The torch reference of `norm.cpp`."""

from __future__ import annotations

from torch import Tensor


def norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + delta, and that over its root mean square times `weight`; (T, size) each, of x's type.

    The sum is rounded before it is normed; the norm is worked out in float32 and rounded once.
    """
    total = x if delta is None else (x.float() + delta.float()).to(x.dtype)
    wide = total.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, (wide * scale * weight.float()).to(x.dtype)
