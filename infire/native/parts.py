"""What a decoder's weights are put together to, so that a step has few and large products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infire.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPart:
    """Matrices of one input, one below the other."""

    name: str
    tensors: tuple[tuple[str, int], ...]  # names, and how many outputs each has
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return sum(size for _, size in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorPart:
    """Vectors, one after the other."""

    name: str
    tensors: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.tensors)


Part = MatrixPart | VectorPart


def parts(config: ModelConfig) -> Iterator[Part]:
    """All that is kept of a model, in the order in which a step reads it."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _matrix("embeddings", hidden, ("model.embed_tokens", vocab))
    for n in range(config.num_layers):
        yield from _layer(config, n)
    yield _vector("norm", ("model.norm.weight", hidden))
    if not config.tied_embeddings:
        yield _matrix("head", hidden, ("lm_head", vocab))


def _layer(config: ModelConfig, n: int) -> Iterator[Part]:
    """What layer `n` is made of."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = (
        (f"{attention}.q_proj", q_size),
        (f"{attention}.k_proj", kv_size),
        (f"{attention}.v_proj", kv_size),
    )
    gate_up = ((f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner))
    out, down = ((f"{attention}.o_proj", hidden),), ((f"{mlp}.down_proj", hidden),)
    for name, inputs, tensors, bias in (
        ("qkv", hidden, qkv, config.qkv_bias),
        ("out", q_size, out, config.out_bias),
        ("gate_up", hidden, gate_up, config.mlp_bias),
        ("down", inner, down, config.mlp_bias),
    ):
        yield _matrix(f"{n}.{name}", inputs, *tensors)
        if bias:
            yield _vector(f"{n}.{name}_bias", *((f"{t}.bias", size) for t, size in tensors))
    for name, tensor in (
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        yield _vector(f"{n}.{name}", (f"model.layers.{n}.{tensor}.weight", hidden))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _vector(f"{n}.{name}", (f"{attention}.{name}.weight", config.head_dim))


def _matrix(name: str, num_inputs: int, *tensors: tuple[str, int]) -> MatrixPart:
    weights = tuple((f"{tensor}.weight", size) for tensor, size in tensors)
    return MatrixPart(name=name, tensors=weights, num_inputs=num_inputs)


def _vector(name: str, *tensors: tuple[str, int]) -> VectorPart:
    return VectorPart(name=name, tensors=tensors)
