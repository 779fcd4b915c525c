"""One layer's gated feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import silu

from infire.model.config import ModelConfig
from infire.model.layers import Beside, Linear, Weights, beside, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    gate_up: Beside
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: (T, hidden) -> (T, hidden)."""
        gate, up = self.gate_up(x)
        return self.down(silu(gate).mul_(up))


def mlp(config: ModelConfig, weights: Weights, name: str) -> MLP:
    """The network under `name`, as in "model.layers.0.mlp"."""
    inner, outer = config.intermediate_size, config.hidden_size
    return MLP(
        gate_up=beside(
            weights,
            ((f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)),
            outer,
            bias=config.mlp_bias,
        ),
        down=linear(weights, f"{name}.down_proj", (outer, inner), bias=config.mlp_bias),
    )
