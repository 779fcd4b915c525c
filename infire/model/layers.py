"""The small parts that decoders are made of. Know neither files nor KV.

Letters: T tokens in the step, H heads, D head size. Arithmetic is in the type of the weights;
norms and rotations are worked out in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm
from torch.nn.functional import linear as functional_linear

from infire.model.config import RopeConfig
from infire.model.rope import rope_frequencies


class Packed(Protocol):
    """A matrix (out, in) in another form than a tensor's: `unweight.gpu.linear.Linear` is one."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: (T, in) -> (T, out)."""

    def rows(self, ids: Tensor) -> Tensor:
        """ids: (T,) int64 -> (T, in), those rows."""


Matrix: TypeAlias = Tensor | Packed


class Weights(Protocol):
    """Where a model gets its parameters from: `infire.weights` and `infire.packed` have two."""

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, on the device it computes on; it must have that shape."""

    def matrices(self, tensors: Seq[tuple[str, int]], num_inputs: int) -> Seq[Matrix]:
        """Matrices of one input, of names and outputs: each by itself, or one of all, stacked."""


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Matrix  # (out, in)
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: (T, in) -> (T, out)."""
        if isinstance(self.weight, Tensor):
            return functional_linear(x, self.weight, self.bias)
        y = self.weight(x)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Beside:
    """Layers of one input, each by itself or all in one."""

    linears: tuple[Linear, ...]
    sizes: tuple[int, ...]  # outputs of each

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (T, in) -> (T, out) of each."""
        if len(self.linears) == len(self.sizes):
            return tuple([linear(x) for linear in self.linears])
        return torch.split(self.linears[0](x), list(self.sizes), -1)


@dataclass(frozen=True, slots=True)
class Embeddings:
    weight: Matrix  # (V, hidden)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: (T,) int64 -> (T, hidden)."""
        if isinstance(self.weight, Tensor):
            return embedding(ids, self.weight)
        return self.weight.rows(ids)


def linear(weights: Weights, name: str, size: tuple[int, int], *, bias: bool) -> Linear:
    """The layer `name` of `size` (out, in)."""
    return beside(weights, ((name, size[0]),), size[1], bias=bias).linears[0]


def beside(
    weights: Weights, layers: Seq[tuple[str, int]], num_inputs: int, *, bias: bool
) -> Beside:
    """Layers of names and outputs."""
    sizes = tuple([size for _, size in layers])
    found = weights.matrices([(f"{name}.weight", size) for name, size in layers], num_inputs)
    if not bias:
        return Beside(tuple([Linear(matrix) for matrix in found]), sizes)
    biases = [weights.take(f"{name}.bias", size) for name, size in layers]
    if len(found) < len(layers):
        biases = [torch.cat(biases)]
    return Beside(tuple(map(Linear, found, biases)), sizes)


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
