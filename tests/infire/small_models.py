"""Model folders of a few thousand random parameters, made and computed by `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 211
# Heads that share (3 to 1), a head size that is not hidden / heads, nothing a power of two.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
_ROWS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama one KV head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "llama no sharing": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6}),
    "llama rope llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3}),
    "llama rope linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LINEAR}),
    "llama biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"head_dim": 12}),
    "qwen2 windows": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3 tied biases": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral window": (MistralConfig, MistralForCausalLM, {"sliding_window": 21}),
}
KINDS = tuple(_ROWS)


def make_folder(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 10**9,
    **sizes: int,
) -> Path:
    """A model folder of that kind, of other sizes if told; the same weights every time."""
    config_class, model_class, changes = _ROWS[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**{**_SIZES, **changes, **sizes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from 0 and 1, so that a bias or norm left out is noticed.
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.uniform_(-1, 1)
            else:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """The likeliest ids after `prompt`, computed with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    ids: list[int] = []
    new = prompt
    while len(ids) < max_tokens:
        output = model(torch.tensor([new], device=model.device), cache=cache, use_cache=True)
        new = [int(output.logits[0, -1].argmax())]
        ids += new
    return ids
