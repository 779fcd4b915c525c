"""A GGUF file of the Llama family small enough to check by hand, and the model it was made of.

Written as llama.cpp's convert_hf_to_gguf.py writes one: the rows of q and k in GGUF's rotary order,
the shapes turned round, the tokenizer as lists of fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

F32 = gguf.GGMLQuantizationType.F32
HEADS, KV_HEADS, LAYERS, HIDDEN, CONTEXT = 6, 2, 2, 96, 128
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
USER_DEFINED = ["<tool_call>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LINES = [
    "The capital of France is Paris, and in 1998 it won 3 to 0. 1998, 1998, 98!",
    "Été à la plage, naïve façade; Größe 42 — schön.",
    "def add(a, b):\n    return a + b  # they're numbers\n",
    "東京は日本の首都です。 今日は良い天気ですね。",
]
_PLACES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "post_attention_layernorm.": "ffn_norm.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


def small_tokenizer() -> Tokenizer:
    """Digits one by one, then byte-level BPE with 60 merges: as SmolLM2's, only smaller."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words  # so that some merges are of digits, which must not be used
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(CONTROL) + 60,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 2, trainer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    return tokenizer


def small_llama(tokenizer: Tokenizer, **changes: Any) -> LlamaForCausalLM:
    """Random weights in float32, the same every time. Three query heads share a KV head."""
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": False,
    }
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    kind: gguf.GGMLQuantizationType = F32,
    *,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """Write `model` to `path`, its matrices as `kind`.

    `fields` and `tensors` are added or replace the file's own; a field that is None is left out.
    """
    writer = gguf.GGUFWriter(path, arch="llama")
    known = {**_fields(model.config, tokenizer), **(fields or {})}
    architecture = known.pop("general.architecture", "llama")
    writer.kv_data[0]["general.architecture"].value = architecture
    for name, value in known.items():
        if value is not None:
            writer.add_key_value(name, value, _type(value), _type_inside(value))
    weights = {
        gguf_name(name): in_gguf_order(name, weight.numpy())
        for name, weight in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    for name, weight in {**weights, **(tensors or {})}.items():
        if weight.ndim == 1 or weight.dtype != np.float32:  # vectors are never quantised
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """`model.layers.1.mlp.up_proj.weight` is `blk.1.ffn_up.weight` there."""
    for long, short in _PLACES.items():
        name = name.replace(long, short)
    return name


def in_gguf_order(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of q and k as `LlamaModel.permute` in convert_hf_to_gguf.py orders them."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _fields(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "general.name": "Tiny 1",
        "general.organization": "Nobody",
        "general.license": "apache-2.0",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(_token_type(token)) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokenizer.token_to_id("<|im_end|>"),
        "tokenizer.ggml.unknown_token_id": tokenizer.token_to_id("<unk>"),
        "tokenizer.chat_template": TEMPLATE,
    }


def _token_type(token: str) -> gguf.TokenType:
    if token in CONTROL:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.USER_DEFINED if token in USER_DEFINED else gguf.TokenType.NORMAL


def _type(value: Any) -> gguf.GGUFValueType:
    match value:
        case bool():
            return gguf.GGUFValueType.BOOL
        case int():
            return gguf.GGUFValueType.UINT32
        case float():
            return gguf.GGUFValueType.FLOAT32
        case str():
            return gguf.GGUFValueType.STRING
        case _:
            return gguf.GGUFValueType.ARRAY


def _type_inside(value: Any) -> gguf.GGUFValueType | None:
    if not isinstance(value, list):
        return None
    return gguf.GGUFValueType.STRING if isinstance(value[0], str) else gguf.GGUFValueType.INT32
