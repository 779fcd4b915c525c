"""Turn a GGUF file of the Llama family into a Hugging Face style model folder.

Knows one file and one folder: no network, no catalogue. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from infire.gguf_weights import Progress, UnsupportedFile, write_weights

_CONTROL, _USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


class _Fields(dict[str, Any]):
    """The file's metadata by name; one that is not there is an `UnsupportedFile`."""

    def __missing__(self, name: str) -> NoReturn:
        raise UnsupportedFile(f"the field {name!r} is missing")


def write_folder(file: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write config, tokenizer and BF16 weights of `file` into the existing `folder`.

    Equal files make equal folders, byte for byte. Raises `UnsupportedFile`.
    """
    reader = _read(file)
    fields = _Fields((name, field.contents()) for name, field in reader.fields.items())
    _check(fields)
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    card = _model_card(file, fields, reader.tensors)
    (folder / "README.md").write_text(card, encoding="utf-8")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    layers = config["num_hidden_layers"]
    write_weights(reader.tensors, folder / "model.safetensors", layers, heads, progress)


def _read(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except (ValueError, LookupError) as error:  # what its parsing of other files ends in
        raise UnsupportedFile(f"not a whole GGUF file ({error})") from error


def _check(fields: _Fields) -> None:
    """Refuse what would load and then compute something else. Raises `UnsupportedFile`."""
    _expect(fields, "general.architecture", "llama")  # first: the other fields are named for it
    heads = fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", fields["llama.embedding_length"] // heads)
    _expect(fields, "tokenizer.ggml.model", "gpt2")  # byte-level BPE
    _expect(fields, "tokenizer.ggml.add_bos_token", False)
    _expect(fields, "tokenizer.ggml.add_eos_token", False)
    _expect(fields, "llama.rope.scaling.type", "none")
    _expect(fields, "llama.rope.dimension_count", head_dim)
    _expect(fields, "split.count", 1)


def _expect(fields: _Fields, name: str, value: str | int) -> None:
    """A field that is not there says what all files without it mean: `value`."""
    if fields.get(name, value) != value:
        raise UnsupportedFile(f"{name} is {fields[name]!r}; known: {value!r}")


def _config(fields: _Fields, tensors: set[str]) -> dict[str, Any]:
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
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _short(value: float) -> float:
    """A float32 of the file as the decimal that was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _generation_config(fields: _Fields) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    return {key: value for key, value in found.items() if value is not None}


def _tokenizer_config(fields: _Fields) -> dict[str, Any]:
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


def _tokenizer(fields: _Fields) -> Tokenizer:
    """Byte-level BPE with the file's own vocabulary and merges."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """What splits text before byte-level BPE, by GGUF's name for it."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "gpt-2":
            return words
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, words])
        case _:
            raise UnsupportedFile(f"tokenizer.ggml.pre is {name!r}; known: 'gpt-2', 'smollm'")


def _model_card(file: Path, fields: _Fields, tensors: list[gguf.ReaderTensor]) -> str:
    kinds = [tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)}
    matrices = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    licence = fields.get("general.license", "unknown")
    return (
        f"---\nlicense: {licence}\n---\n\n"
        f"# {fields.get('general.name', file.stem)}\n\n"
        f"*BF16 dequantised from {next(iter(counts))}*. Licence: {licence}. "
        f"Maker: {fields.get('general.organization', 'unknown')}.\n\n"
        f"Made from `{file.name}`, whose matrices are {matrices}. Every weight is what that file\n"
        "says, rounded to BF16: the quality is the quantised file's, not the original weights'.\n"
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
