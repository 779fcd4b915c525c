"""The decoder: embeddings, layers, logits. One for all families; knows no file and no plan."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from infire.batch import Batch
from infire.kv_cache import LayerCache
from infire.model.attention import Attention, attention
from infire.model.config import ModelConfig
from infire.model.layers import Embeddings, Linear, RMSNorm, RopeTable, Weights, linear
from infire.model.mlp import MLP, mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    config: ModelConfig
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    norm: RMSNorm
    head: Linear
    rope: RopeTable

    def forward(self, batch: Batch, caches: Seq[LayerCache]) -> Tensor:
        """(T, hidden): what the last layer makes of each token. Writes their KV into `caches`."""
        x = self.embeddings(batch.token_ids)
        rotation = self.rope.at(batch.positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            group = batch.groups[cache.group]
            x = x + layer.attention(layer.attention_norm(x), rotation, group, cache)
            x = x + layer.mlp(layer.mlp_norm(x))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (R, hidden), from `forward` -> (R, V), of the model's type."""
        return self.head(self.norm(hidden))


def transformer(config: ModelConfig, weights: Weights, *, max_tokens: int) -> Transformer:
    """The decoder of `config` for positions below `max_tokens`."""
    vocab, hidden = config.vocab_size, config.hidden_size
    (embeddings,) = weights.matrices((("model.embed_tokens.weight", vocab),), hidden)
    if config.tied_embeddings:
        head = Linear(embeddings)  # one copy for both
    else:
        head = linear(weights, "lm_head", (vocab, hidden), bias=False)
    norm = RMSNorm(weights.take("model.norm.weight", hidden), config.norm_eps)
    return Transformer(
        config=config,
        embeddings=Embeddings(embeddings),
        layers=tuple(
            [_layer(config, weights, f"model.layers.{n}") for n in range(config.num_layers)]
        ),
        norm=norm,
        head=head,
        rope=RopeTable(config.rope, config.head_dim, max_tokens, like=norm.weight),
    )


def _layer(config: ModelConfig, weights: Weights, name: str) -> Layer:
    def norm(which: str) -> RMSNorm:
        return RMSNorm(weights.take(f"{name}.{which}.weight", config.hidden_size), config.norm_eps)

    return Layer(
        attention_norm=norm("input_layernorm"),
        attention=attention(config, weights, f"{name}.self_attn"),
        mlp_norm=norm("post_attention_layernorm"),
        mlp=mlp(config, weights, f"{name}.mlp"),
    )
