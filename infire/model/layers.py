"""The small parts that decoders are made of. Know neither files nor KV.

Letters: T tokens in the step, H heads, D head size. Arithmetic is in the type of the weights;
norms and rotations are worked out in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as functional_linear
from torch.nn.functional import rms_norm

from infire.model.config import RopeConfig
from infire.model.rope import rope_frequencies


class Weights(Protocol):
    """Where a model gets its parameters from. `infire.weights.Folder` and tests are two."""

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, on the device it computes on; it must have that shape."""


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: (T, in) -> (T, out)."""
        return functional_linear(x, self.weight, self.bias)


def linear(weights: Weights, name: str, size: tuple[int, int], *, bias: bool) -> Linear:
    """The layer `name` of `size` (out, in)."""
    return Linear(
        weights.take(f"{name}.weight", *size),
        weights.take(f"{name}.bias", size[0]) if bias else None,
    )


@dataclass(frozen=True, slots=True)
class RMSNorm:
    weight: Tensor  # (size,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., size), each scaled to a root mean square of 1, then by the weights."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding at some positions; as halves of a head, as Llama's weights want it."""

    cos: Tensor  # (T, 1, D), of the model's type
    sin: Tensor  # (T, 1, D): the first half negative

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: (T, H, D) -> the same, rotated."""
        return torch.addcmul(heads * self.cos, heads.roll(heads.shape[-1] // 2, -1), self.sin)


class RopeTable:
    """Rotations of the positions 0 .. num_tokens - 1, worked out once."""

    def __init__(self, config: RopeConfig, head_dim: int, num_tokens: int, like: Tensor) -> None:
        frequencies = torch.tensor(rope_frequencies(config, head_dim))
        positions = torch.arange(num_tokens, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1).to(like)
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(like)

    def at(self, positions: Tensor) -> Rotation:
        """positions: (T,) int64."""
        return Rotation(self._cos.index_select(0, positions), self._sin.index_select(0, positions))
