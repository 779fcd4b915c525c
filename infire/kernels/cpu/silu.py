"""The torch reference of `silu.cpp`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_reference(gate_up: Tensor) -> Tensor:
    """(T, I) of x's type, from gate | up (T, 2 I): silu(gate) * up in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    return (silu(gate) * up).to(gate_up.dtype)
