"""What tells one family of decoders from another: a row each. Knows no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infire.model.config import (
    BadModel,
    ConfigFile,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeParameters,
    UnsupportedModel,
)

Windows = tuple[int | None, ...]


def _no_window(file: ConfigFile) -> Windows:
    return (None,) * file.num_hidden_layers


def _same_window(file: ConfigFile) -> Windows:
    return (file.sliding_window,) * file.num_hidden_layers


def _window_by_layer(file: ConfigFile) -> Windows:
    """As `layer_types` says, or, in older files, from layer `max_window_layers` on."""
    if not file.use_sliding_window:
        return _no_window(file)
    sliding = [n >= file.max_window_layers for n in range(file.num_hidden_layers)]
    if file.layer_types is not None:
        sliding = [kind == "sliding_attention" for kind in file.layer_types]
    return tuple(file.sliding_window if slides else None for slides in sliding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family departs from Llama. None: its `config.json` says, as `attention_bias`."""

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False  # RMS norm of each query and key head, before it is rotated
    windows: Callable[[ConfigFile], Windows] = _no_window


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, out_bias=False, windows=_same_window),
    "Qwen2ForCausalLM": Family(qkv_bias=True, out_bias=False, windows=_window_by_layer),
    "Qwen3ForCausalLM": Family(qk_norm=True, windows=_window_by_layer),
}


def model_config(file: ConfigFile) -> ModelConfig:
    """The decoder that `config.json` describes. Raises `UnsupportedModel`, `BadModel`."""
    family = _family(file)
    _refuse_unsupported(file)
    num_kv_heads = file.num_key_value_heads or file.num_attention_heads
    if file.num_attention_heads % num_kv_heads:
        raise BadModel(f"{file.num_attention_heads} heads cannot share {num_kv_heads} KV heads")
    windows = family.windows(file)
    if len(windows) != file.num_hidden_layers:
        raise BadModel(f"{len(windows)} layer_types for {file.num_hidden_layers} layers")
    return ModelConfig(
        vocab_size=file.vocab_size,
        hidden_size=file.hidden_size,
        intermediate_size=file.intermediate_size,
        num_heads=file.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=file.head_dim or file.hidden_size // file.num_attention_heads,
        norm_eps=file.rms_norm_eps,
        context_window=file.max_position_embeddings,
        rope=_rope(file),
        windows=windows,
        qkv_bias=file.attention_bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=file.attention_bias if family.out_bias is None else family.out_bias,
        mlp_bias=file.mlp_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=file.tie_word_embeddings,
    )


def _family(file: ConfigFile) -> Family:
    for name in file.architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    asked = ", ".join(file.architectures) or "none"
    raise UnsupportedModel(f"architecture {asked}; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(file: ConfigFile) -> None:
    if file.hidden_act != "silu":
        raise UnsupportedModel(f"hidden_act {file.hidden_act}; supported is silu")
    if file.partial_rotary_factor != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {file.partial_rotary_factor}; must be 1")
    if file.quantization_config is not None:
        raise UnsupportedModel("quantised weights; supported are bfloat16, float16 and float32")


def _rope(file: ConfigFile) -> RopeConfig:
    given = file.rope_parameters or file.rope_scaling or RopeParameters()
    theta = given.rope_theta or file.rope_theta
    match given.rope_type or given.type or "default":
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, stretch=_field(given, "factor"))
        case "llama3":
            scaling = Llama3Scaling(
                factor=_field(given, "factor"),
                low_freq_factor=_field(given, "low_freq_factor"),
                high_freq_factor=_field(given, "high_freq_factor"),
                original_context=int(_field(given, "original_max_position_embeddings")),
            )
            return RopeConfig(theta=theta, llama3=scaling)
        case other:
            raise UnsupportedModel(f"rope type {other}; supported are default, linear, llama3")


def _field(given: RopeParameters, name: str) -> float:
    value: float | None = getattr(given, name)
    if value is None:
        raise BadModel(f"rope scaling without {name}")
    return value
