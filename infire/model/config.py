"""What a model is made of, read from its `config.json`. Knows no weights and no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct


class BadModel(ValueError):
    """A model folder that cannot be served, and why."""


class MissingFile(BadModel):
    """A file that every model folder has is not there."""


class UnsupportedModel(BadModel):
    """The folder is in order, but nothing here computes this kind of model."""


class RopeParameters(Struct, frozen=True):
    """`rope_parameters` of transformers 5, `rope_scaling` of 4."""

    rope_type: str | None = None
    type: str | None = None  # older name of `rope_type`
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class ConfigFile(Struct, frozen=True, kw_only=True):
    """The fields of `config.json` that decoders here differ by; the rest is not read."""

    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None
    partial_rotary_factor: float = 1.0
    quantization_config: dict[str, object] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Slow rotations are slowed further, by `factor`, to reach past the trained context.

    Between the two wavelengths `original_context / *_freq_factor` the change is gradual.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    stretch: float = 1.0  # "linear" scaling: positions are divided by this
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder, in full: two models with equal configurations compute the same function."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_window: int  # tokens
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer: tokens it sees; None: all
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool

    @property
    def num_layers(self) -> int:
        return len(self.windows)


def read_config(folder: Path) -> ConfigFile:
    """`config.json` of a model folder. Raises `MissingFile`, `BadModel`."""
    path = folder / "config.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFile(f"{folder} is no model folder: it has no config.json") from error
    try:
        return msgspec.json.decode(content, type=ConfigFile)
    except msgspec.DecodeError as error:
        raise BadModel(f"{path}: {error}") from error
