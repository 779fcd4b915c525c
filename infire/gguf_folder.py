"""Turn a GGUF file of the Llama family into a Hugging Face style model folder.

Knows one file and one folder: no network, no catalogue. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

Progress = Callable[[int, int], None]  # tensors done, tensors in all

# GGUF name -> Hugging Face name; {} is the layer.
_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
# What runs before byte-level BPE, by GGUF's name for it.
_SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


class UnsupportedFile(ValueError):
    """The GGUF file holds something that cannot be turned into a folder; says what."""


def write_folder(file: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write config, tokenizer and BF16 weights of `file` into the existing `folder`.

    Raises `UnsupportedFile`.
    """
    try:
        reader = gguf.GGUFReader(file)
    except ValueError as error:
        raise UnsupportedFile(f"{file.name} is not a GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise UnsupportedFile(
            f"{file.name}: architecture {fields.get('general.architecture')!r}, not 'llama'"
        )
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(_model_card(file, fields, reader.tensors))
    weights = _weights(reader.tensors, config, progress)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(fields: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _short(value: float) -> float:
    """A float32 of the file as the decimal that was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    return {key: value for key, value in found.items() if value is not None}


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, name in names.items():
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[key] = tokens[token_id]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with the file's own vocabulary and merges."""
    if (kind := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise UnsupportedFile(f"tokenizer {kind!r}, not byte-level BPE ('gpt2')")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        added = AddedToken(token, normalized=False, special=kind == _CONTROL)
        if kind == _CONTROL:
            tokenizer.add_special_tokens([added])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([added])
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, gpt2])
        case "llama-bpe":
            split = pre_tokenizers.Split(Regex(_SPLIT_LLAMA3), behavior="isolated")
            return pre_tokenizers.Sequence([split, bytes_only])
        case "gpt-2":
            return gpt2
        case _:
            known = "smollm, llama-bpe, gpt-2"
            raise UnsupportedFile(f"pre-tokenizer {name!r}; known: {known}")


def _weights(
    tensors: list[gguf.ReaderTensor], config: dict[str, Any], progress: Progress
) -> dict[str, torch.Tensor]:
    """Every tensor as BF16 under its Hugging Face name."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for count, tensor in enumerate(tensors):
        name, part = _name(tensor.name)
        # a copy where nothing was quantised: the file is mapped read-only
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if part in heads:
            values = _undo_rotary_order(values, heads[part])
        weights[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        progress(count + 1, len(tensors))
    return dict(sorted(weights.items()))


def _name(name: str) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, and its part of the layer ("attn_q", ...)."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4:
        pattern = ".".join(("blk", "{}", *parts[2:]))
        if pattern in _TENSORS:
            return _TENSORS[pattern].format(parts[1]), parts[2]
    if name in _TENSORS:
        return _TENSORS[name], parts[0]
    raise UnsupportedFile(f"tensor {name!r} has no counterpart in a Llama model")


def _undo_rotary_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of q or k as Hugging Face orders them. weight: (num_heads * D, K) float32.

    GGUF interleaves the two halves of each head, so that a rotated pair lies side by side; the
    reverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    half = rows // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _model_card(file: Path, fields: dict[str, Any], tensors: list[gguf.ReaderTensor]) -> str:
    kinds = [tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    name = fields.get("general.name", file.stem)
    return (
        f"# {name}\n\n"
        f"*BF16 dequantised from {most}*: made from `{file.name}`, "
        f"licence {fields.get('general.license', 'unknown')}.\n"
        "Its quality is that of the quantised file, not of the original weights.\n"
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
