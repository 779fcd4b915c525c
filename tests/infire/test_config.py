"""What is read out of a `config.json`, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from infire.model.config import BadModel, MissingFile, RopeConfig, UnsupportedModel, read_config
from infire.model.families import FAMILIES, model_config
from infire.model.rope import rope_frequencies

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def written(folder: Path, **changes: Any) -> Path:
    content = {name: value for name, value in (_LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, **changes: Any) -> Any:
    return model_config(read_config(written(folder, **changes)))


def test_what_a_file_leaves_out_follows_from_the_rest(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=...)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 8, 8)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.windows == (None,) * 4
    assert not config.tied_embeddings


def test_a_family_is_a_row(tmp_path: Path) -> None:
    def biases(architecture: str, **changes: Any) -> tuple[bool, bool, bool]:
        config = read(tmp_path, architectures=[architecture], **changes)
        return config.qkv_bias, config.out_bias, config.qk_norm

    assert biases("LlamaForCausalLM") == (False, False, False)
    assert biases("LlamaForCausalLM", attention_bias=True) == (True, True, False)
    assert biases("Qwen2ForCausalLM") == (True, False, False)
    assert biases("Qwen3ForCausalLM") == (False, False, True)
    assert biases("MistralForCausalLM", attention_bias=True) == (False, False, False)


def test_windows_by_family(tmp_path: Path) -> None:
    def windows(architecture: str, **changes: Any) -> tuple[int | None, ...]:
        return read(tmp_path, architectures=[architecture], sliding_window=9, **changes).windows

    layer_types = ["sliding_attention", "full_attention"] * 2
    slides = {"use_sliding_window": True}
    assert windows("LlamaForCausalLM") == (None,) * 4
    assert windows("MistralForCausalLM") == (9,) * 4
    assert windows("Qwen2ForCausalLM") == (None,) * 4
    assert windows("Qwen2ForCausalLM", **slides, max_window_layers=3) == (None, None, None, 9)
    assert windows("Qwen3ForCausalLM", **slides, layer_types=layer_types) == (9, None, 9, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},  # transformers 5
        {"rope_theta": 5e5},  # transformers 4
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=lambda rope: json.dumps(rope)[:60],
)
def test_rotations_are_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    found = rope_frequencies(read(tmp_path, **rope).rope, 64)
    given = rope.get("rope_parameters") or rope.get("rope_scaling", {}) | {"rope_theta": 5e5}
    kind = given.get("rope_type") or given.get("type", "default")
    config = LlamaConfig(head_dim=64, rope_parameters=given | {"rope_type": kind})
    if kind == "default":
        expected = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-6, atol=0)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="is no model folder"):
        read_config(tmp_path)


def test_an_unknown_architecture_is_told_which_are_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        read(tmp_path, architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in str(raised.value)
    assert all(name in str(raised.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ],
)
def test_what_is_not_computed_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": ...}, "missing required field `hidden_size`"),
        ({"vocab_size": "many"}, "Expected `int`, got `str`.*vocab_size"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 KV heads"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling without factor"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "1 layer_types for 4 layers",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadModel, match=said):
        read(tmp_path, **changes)


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(BadModel, match=r"config.json: .*truncated"):
        read_config(tmp_path)
