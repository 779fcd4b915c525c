"""Write the weights of a GGUF file of the Llama family as BF16 safetensors.

A few rows at a time, so that a model of any size takes little memory. Knows no configuration
file and no tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

Progress = Callable[[int, int], None]  # tensors done, tensors in all

_PART_ELEMENTS = 1 << 22  # dequantised at once: 16 MB as float32
_BF16 = GGMLQuantizationType.BF16

# GGUF name -> Hugging Face name; {} is the layer.
_NAMES = {
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
_MAY_BE_TIED = {"output.weight"}  # absent: the embedding is used once more


class UnsupportedFile(ValueError):
    """The GGUF file holds something that cannot be turned into a folder; says what."""


def write_weights(
    tensors: list[ReaderTensor],
    path: Path,
    num_layers: int,
    num_heads: dict[str, int],
    progress: Progress,
) -> None:
    """Write `tensors` to `path`. `num_heads`: of "attn_q" and "attn_k". Raises UnsupportedFile.

    The layout is that of safetensors' own writer, so equal weights make an equal file:
    https://github.com/huggingface/safetensors#format
    """
    by_name = _by_name(tensors, num_layers)
    with path.open("wb") as file:
        _write_header(file, by_name)
        for count, tensor in enumerate(by_name.values(), start=1):
            for part in _parts(tensor, num_heads):
                file.write(quantize(part, _BF16).tobytes())
            progress(count, len(by_name))


def _by_name(tensors: list[ReaderTensor], num_layers: int) -> dict[str, ReaderTensor]:
    """The tensors by Hugging Face name, in order of it: each that a model has, and no other."""
    found = {tensor.name: tensor for tensor in tensors}
    names = {
        name.format(layer): long.format(layer)
        for layer in range(num_layers)
        for name, long in _NAMES.items()
    }
    for name in sorted(found.keys() - names.keys()):
        raise UnsupportedFile(
            f"tensor {name!r} has no counterpart in a Llama model of {num_layers} layers"
        )
    for name in sorted(names.keys() - found.keys() - _MAY_BE_TIED):
        raise UnsupportedFile(f"tensor {name!r} is missing")
    return dict(sorted((names[name], tensor) for name, tensor in found.items()))


def _write_header(file: BinaryIO, tensors: dict[str, ReaderTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF: the fastest first
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _parts(tensor: ReaderTensor, num_heads: dict[str, int]) -> Iterator[NDArray[np.float32]]:
    """The tensor's rows in order, some at a time: (rows, K) float32."""
    data = tensor.data.reshape(-1, tensor.data.shape[-1])  # (rows, bytes or numbers a row)
    part = tensor.name.split(".")[-2]
    at_once = max(1, _PART_ELEMENTS // int(tensor.shape[0]))
    if part in num_heads:
        at_once = len(data)  # a head's rows change places
    for start in range(0, len(data), at_once):
        rows = data[start : start + at_once]
        try:
            values = dequantize(rows, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UnsupportedFile(f"tensor {tensor.name!r} is {kind}, which is unknown") from error
        if part in num_heads:
            values = _undo_rotary_order(values, num_heads[part])
        yield values


def _undo_rotary_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of q or k as Hugging Face orders them. weight: (num_heads * D, K) float32.

    GGUF interleaves the two halves of each head, so that a rotated pair lies side by side; the
    reverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    half = rows // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
