"""One layer's attention: projections, rotation, KV written and read. Knows no plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from infire.batch import GroupBatch
from infire.kernels.paged_attention import paged_attention
from infire.kv_cache import LayerCache
from infire.model.config import ModelConfig
from infire.model.layers import Beside, Linear, RMSNorm, Rotation, Weights, beside, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    qkv: Beside
    out: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    head_dim: int

    def __call__(
        self, x: Tensor, rotation: Rotation, batch: GroupBatch, cache: LayerCache
    ) -> Tensor:
        """x: (T, hidden) -> (T, hidden). Writes the KV of the step's tokens."""
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in self.qkv(x))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cache.write(rotation(k), v, batch.cells)
        mixed = paged_attention(
            rotation(q), cache.k, cache.v, batch.tiles, scale=self.head_dim**-0.5
        )
        return self.out(mixed.flatten(1))


def attention(config: ModelConfig, weights: Weights, name: str) -> Attention:
    """The attention under `name`, as in "model.layers.0.self_attn"."""
    hidden, size = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * size, config.num_kv_heads * size

    def norm(which: str) -> RMSNorm | None:
        if not config.qk_norm:
            return None
        return RMSNorm(weights.take(f"{name}.{which}.weight", size), config.norm_eps)

    return Attention(
        qkv=beside(
            weights,
            ((f"{name}.q_proj", q_size), (f"{name}.k_proj", kv_size), (f"{name}.v_proj", kv_size)),
            hidden,
            bias=config.qkv_bias,
        ),
        out=linear(weights, f"{name}.o_proj", (hidden, q_size), bias=config.out_bias),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        head_dim=size,
    )
