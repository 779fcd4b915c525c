"""The torch reference of `rope.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(
    heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """heads (T, H, D), each normed with `weight` (D,) if there is one, and rotated; in float64.

    cos, sin: (T, D / 2), of the angles at each token's position.
    """
    wide = heads.double()
    if weight is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    low, high = wide.chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), -1)
