"""An encoder of BERT's family: texts' ids in, a vector of each out. Knows no file and no queue.

Texts are computed packed, one after the other, so that no product has rows of padding; attention
alone sees them in groups of about the same length, padded to that of the longest.

Letters: T tokens in the batch, N texts, H heads, D head size, L tokens of a group's longest text.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import (
    embedding,
    gelu,
    layer_norm,
    normalize,
    relu,
    scaled_dot_product_attention,
)

from infire.model.config import UnsupportedModel
from infire.model.encoder_config import EncoderConfig
from infire.model.layers import Linear, Weights, linear
from infire.notes import Pooling

# A text joins a group whose longest is at most so many times as long, or this much longer: below,
# calls cost more than the padding that they would spare.
_MOST_LONGER, _FEW_TOKENS = 1.25, 16

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
}


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that attention sees together; slices are of the batch's tokens, if all are as long."""

    begin: int  # its first token
    end: int  # after its last
    num_texts: int
    longest: int  # tokens
    # Where some are shorter, (N, L) int64: each place's token in the group, and whether it is one.
    tokens: Tensor | None = None
    present: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor  # (size,)
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., size)."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """Norms come after the sums, as in the first transformers."""

    qkv: Linear  # all three in one
    out: Linear
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    mlp_norm: LayerNorm
    activation: Callable[[Tensor], Tensor]
    num_heads: int

    def __call__(self, x: Tensor, groups: Seq[Group]) -> Tensor:
        """x: (T, hidden) -> (T, hidden)."""
        x = self.attention_norm(x + self.out(self._attention(self.qkv(x), groups)))
        return self.mlp_norm(x + self.down(self.activation(self.up(x))))

    def _attention(self, qkv: Tensor, groups: Seq[Group]) -> Tensor:
        """qkv: (T, 3 * hidden) -> (T, hidden)."""
        mixed = [self._mixed(qkv[group.begin : group.end], group) for group in groups]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def _mixed(self, qkv: Tensor, group: Group) -> Tensor:
        mask = None
        if group.tokens is not None and group.present is not None:
            qkv = qkv[group.tokens]
            mask = group.present[:, None, None, :]  # (N, 1, 1, L)
        shape = (group.num_texts, group.longest, 3, self.num_heads, -1)
        q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4)  # each (N, H, L, D)
        heads = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = heads.transpose(1, 2).flatten(2)  # (N, L, hidden)
        return mixed.flatten(0, 1) if group.present is None else mixed[group.present]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    config: EncoderConfig
    words: Tensor  # (V, hidden)
    positions: Tensor  # (context_window, hidden): of a text's first token first; with its type
    norm: LayerNorm
    layers: tuple[EncoderLayer, ...]

    @torch.inference_mode()
    def vectors(self, texts: Seq[Seq[int]], poolings: Seq[Pooling | None]) -> Tensor:
        """(N, hidden) float32 on the CPU: a vector of each text, of which none is empty."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        lengths = [len(texts[n]) for n in order]
        device = self.words.device
        ids = torch.tensor([it for n in order for it in texts[n]], device=device)
        places = torch.cat([torch.arange(length) for length in lengths]).to(device)
        x = self.norm(embedding(ids, self.words) + embedding(places, self.positions))
        groups = groups_of(lengths, device)
        for layer in self.layers:
            x = layer(x, groups)
        pooled = _pooled(x.float(), lengths, [poolings[n] or self.config.pooling for n in order])
        if self.config.normalized:
            pooled = normalize(pooled, dim=1)
        vectors = torch.empty(pooled.shape)
        vectors[order] = pooled.cpu()
        return vectors


def groups_of(lengths: Seq[int], device: torch.device) -> list[Group]:
    """Of texts one after the other, of ascending lengths."""
    groups: list[Group] = []
    first = begin = 0
    for n in range(1, len(lengths) + 1):
        if n < len(lengths) and _fits(lengths[first], lengths[n]):
            continue
        group = _group(begin, lengths[first:n], device)
        groups.append(group)
        first, begin = n, group.end
    return groups


def _fits(shortest: int, longest: int) -> bool:
    return longest <= max(_MOST_LONGER * shortest, _FEW_TOKENS)


def _group(begin: int, lengths: Seq[int], device: torch.device) -> Group:
    num_tokens, longest = sum(lengths), lengths[-1]
    end = begin + num_tokens
    if lengths[0] == longest:
        return Group(begin, end, len(lengths), longest)
    sizes = torch.tensor(lengths)
    present = torch.arange(longest) < sizes[:, None]  # (N, L)
    tokens = torch.zeros(present.shape, dtype=torch.int64)
    tokens[present] = torch.arange(num_tokens)
    return Group(begin, end, len(lengths), longest, tokens.to(device), present.to(device))


def _pooled(x: Tensor, lengths: Seq[int], poolings: Seq[Pooling]) -> Tensor:
    """x: (T, hidden) float32 -> (N, hidden)."""
    sizes = torch.tensor(lengths, device=x.device)
    if all(pooling == "mean" for pooling in poolings):
        return torch.segment_reduce(x, "mean", lengths=sizes)
    firsts = x[sizes.cumsum(0) - sizes]
    if all(pooling == "cls" for pooling in poolings):
        return firsts
    by_mean = torch.tensor([pooling == "mean" for pooling in poolings], device=x.device)
    return torch.where(by_mean[:, None], torch.segment_reduce(x, "mean", lengths=sizes), firsts)


def encoder(config: EncoderConfig, weights: Weights) -> Encoder:
    """The encoder of `config`. Raises `UnsupportedModel`."""
    if config.activation not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(f"hidden_act {config.activation}; supported are {supported}")
    hidden, name = config.hidden_size, f"{config.prefix}embeddings"
    positions = weights.take(f"{name}.position_embeddings.weight", config.num_positions, hidden)
    # A text by itself is all of the first type: what that adds is added to the positions, once.
    types = weights.take(f"{name}.token_type_embeddings.weight", config.num_types, hidden)
    return Encoder(
        config=config,
        words=weights.take(f"{name}.word_embeddings.weight", config.vocab_size, hidden),
        positions=positions[config.first_position :] + types[0],
        norm=_norm(config, weights, f"{name}.LayerNorm"),
        layers=tuple(
            [
                _layer(config, weights, f"{config.prefix}encoder.layer.{n}")
                for n in range(config.num_layers)
            ]
        ),
    )


def _layer(config: EncoderConfig, weights: Weights, name: str) -> EncoderLayer:
    hidden, inner = config.hidden_size, config.intermediate_size
    return EncoderLayer(
        qkv=_qkv(hidden, weights, f"{name}.attention.self"),
        out=linear(weights, f"{name}.attention.output.dense", (hidden, hidden), bias=True),
        attention_norm=_norm(config, weights, f"{name}.attention.output.LayerNorm"),
        up=linear(weights, f"{name}.intermediate.dense", (inner, hidden), bias=True),
        down=linear(weights, f"{name}.output.dense", (hidden, inner), bias=True),
        mlp_norm=_norm(config, weights, f"{name}.output.LayerNorm"),
        activation=_ACTIVATIONS[config.activation],
        num_heads=config.num_heads,
    )


def _qkv(hidden: int, weights: Weights, name: str) -> Linear:
    """Stacked: one product is faster than three of its parts."""
    parts = ("query", "key", "value")
    return Linear(
        torch.cat([weights.take(f"{name}.{part}.weight", hidden, hidden) for part in parts]),
        torch.cat([weights.take(f"{name}.{part}.bias", hidden) for part in parts]),
    )


def _norm(config: EncoderConfig, weights: Weights, name: str) -> LayerNorm:
    return LayerNorm(
        weights.take(f"{name}.weight", config.hidden_size),
        weights.take(f"{name}.bias", config.hidden_size),
        config.norm_eps,
    )
