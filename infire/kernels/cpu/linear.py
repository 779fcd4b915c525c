"""The torch reference of `linear.cpp` and `head.cpp`."""

from __future__ import annotations

from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, N) of x's type, from x (T, K), weight (N, K) and bias (N,); in float32, rounded once."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def head_reference(x: Tensor, weight: Tensor) -> Tensor:
    """(R, V) float32 logits, from x (R, K) and weight (V, K)."""
    return x.float() @ weight.float().T
