"""A GGUF file becomes the model folder it was once made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from infire import gguf_weights
from infire.gguf_folder import write_folder
from infire.gguf_weights import UnsupportedFile
from tests.fakes.small_gguf import (
    CONTEXT,
    CONTROL,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TEMPLATE,
    small_llama,
    small_tokenizer,
    write_gguf,
)

TEXTS = [
    "The capital of France is Paris.",
    "in 1998, 3.14159 and 0000; 12abc34",
    "  spaces   and\n\n\ttabs\r\n ",
    "naïve façade: 東京 🦙🔥 \u0301\u200d",
    "def f(x):\n    return {'a': x**2}  # they'll",
    "<|im_start|>user\n<tool_call>{}<|im_end|>\n<|not_one|><unk>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return small_llama(tokenizer)


def converted(tmp_path: Path, *args: Any, **kwargs: Any) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(write_gguf(tmp_path / "Tiny.gguf", *args, **kwargs), folder)
    return folder


def per_block(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every 32 numbers of a row are quantised together. (rows, K) -> (rows, K / 32, 32)."""
    return weight.reshape(len(weight), -1, 32)


def rounding(weight: NDArray[np.float32], kind: Kind) -> NDArray[np.float32]:
    """How far the file may be from `weight`: half a quantisation step, by the format's definition.

    Nothing for F32; half of F16's last place; else the step of a number's block.
    """
    blocks = per_block(weight)
    match kind:
        case Kind.F32:
            step = np.zeros_like(blocks)
        case Kind.F16:
            step = np.abs(blocks) * 2.0**-10 + 2.0**-24
        case Kind.Q8_0:
            step = np.abs(blocks).max(-1, keepdims=True) / 127 + 0 * blocks
        case _:  # 4 bits between the smallest and the largest
            step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15 + 0 * blocks
    return (step / 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1], ids=lambda k: k.name)
def test_every_weight_is_what_it_was_before_quantisation(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, kind: Kind
) -> None:
    """Also q and k, whose rows have another order in the file."""
    found = load_file(converted(tmp_path, model, tokenizer, kind) / "model.safetensors")
    original = model.state_dict()
    assert set(found) == set(original)
    for name, weight in original.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].shape == weight.shape
        if weight.dim() == 1 or kind == Kind.F32:
            torch.testing.assert_close(found[name], weight.to(torch.bfloat16), rtol=0, atol=0)
            continue
        bound = rounding(weight.numpy(), kind)
        bound += 2.0**-8 * (np.abs(weight.numpy()) + bound)  # BF16 keeps 8 bits
        bound += 2.0**-10 * np.abs(weight.numpy()).max()  # the scales are F16
        error = np.abs(found[name].float().numpy() - weight.numpy())
        assert (error <= bound).all(), name


def test_logits_are_those_of_the_model_that_was_written(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    folder = converted(tmp_path, model, tokenizer)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    rounded = small_llama(tokenizer)
    rounded.load_state_dict(
        {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    )
    ids = torch.randint(tokenizer.get_vocab_size(), (2, 77), generator=torch.manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, rounded(ids).logits, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_stored_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tied = small_llama(tokenizer, tie_word_embeddings=True)
    folder = converted(tmp_path, tied, tokenizer)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_configuration_says_what_the_file_says(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    folder = converted(tmp_path, model, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    end = tokenizer.token_to_id("<|im_end|>")
    expected = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,  # and not the float32 next to it
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
    }
    assert {name: config[name] for name in expected} == expected
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": end,
        "pad_token_id": end,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_ids_it_had(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, text: str
) -> None:
    folder = converted(tmp_path, model, tokenizer)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text).ids
    assert written.encode(text).ids == ids
    assert reference(text).input_ids == ids
    assert written.decode(ids, skip_special_tokens=False) == text
    assert reference.decode(ids, skip_special_tokens=False) == text


def test_digits_stay_together_where_the_file_says_so(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    folder = converted(tmp_path, model, tokenizer, fields={"tokenizer.ggml.pre": "gpt-2"})
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert "98" in written.encode("1998").tokens
    assert tokenizer.encode("1998").tokens == ["1", "9", "9", "8"]


def test_special_tokens_are_special_and_user_defined_ones_are_text(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    folder = converted(tmp_path, model, tokenizer)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(folder)
    added = {token.content: token.special for token in written.get_added_tokens_decoder().values()}
    assert added == {**dict.fromkeys(CONTROL, True), "<tool_call>": False}
    ids = reference("<|im_start|>a<tool_call><|im_end|>").input_ids
    assert reference.decode(ids, skip_special_tokens=True) == "a<tool_call>"
    assert (reference.bos_token, reference.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (reference.unk_token, reference.pad_token) == ("<unk>", "<|im_end|>")


def test_the_chat_template_is_the_files(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    reference = AutoTokenizer.from_pretrained(converted(tmp_path, model, tokenizer))
    assert reference.chat_template == TEMPLATE
    asked = reference.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_without_a_chat_template_makes_a_folder_without_one(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    folder = converted(tmp_path, model, tokenizer, fields={"tokenizer.chat_template": None})
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_the_model_card_names_the_file_its_type_and_its_licence(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    card = (converted(tmp_path, model, tokenizer, Kind.Q4_1) / "README.md").read_text()
    assert "# Tiny 1\n" in card
    assert "*BF16 dequantised from Q4_1*. Licence: apache-2.0. Maker: Nobody." in card
    assert "`Tiny.gguf`, whose matrices are 16 Q4_1." in card


def test_equal_files_make_equal_folders_that_others_may_read(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    file = write_gguf(tmp_path / "Tiny.gguf", model, tokenizer, Kind.Q8_0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_folder(file, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len({(tmp_path / "a" / name).stat().st_mode for name in files}) == 1


def test_progress_ends_at_all_tensors(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    seen: list[tuple[int, int]] = []
    file = write_gguf(tmp_path / "Tiny.gguf", model, tokenizer)
    write_folder(file, tmp_path, lambda done, total: seen.append((done, total)))
    total = len(model.state_dict())
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("num_rows", [1, 7, 95])
def test_a_matrix_converted_in_parts_is_the_same(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
) -> None:
    """A model of any size takes little memory: the last part is a smaller one."""
    file = write_gguf(tmp_path / "Tiny.gguf", model, tokenizer, Kind.Q8_0)
    write_folder(file, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(gguf_weights, "_PART_ELEMENTS", num_rows * HIDDEN)
    write_folder(file, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == whole


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"general.architecture": "gemma3", "llama.attention.head_count": None},
        "general.architecture is 'gemma3'; known: 'llama'",
    ),
    "another kind of tokenizer": (
        {"tokenizer.ggml.model": "llama"},
        "tokenizer.ggml.model is 'llama'; known: 'gpt2'",
    ),
    "another pre-tokenizer": (
        {"tokenizer.ggml.pre": "llama-bpe"},
        "tokenizer.ggml.pre is 'llama-bpe'; known: 'gpt-2', 'smollm'",
    ),
    "scaled positions": (
        {"llama.rope.scaling.type": "yarn"},
        "llama.rope.scaling.type is 'yarn'; known: 'none'",
    ),
    "half-rotated heads": (
        {"llama.rope.dimension_count": 8},
        "llama.rope.dimension_count is 8; known: 16",
    ),
    "a start token for every text": (
        {"tokenizer.ggml.add_bos_token": True},
        "tokenizer.ggml.add_bos_token is True; known: False",
    ),
    "one file of several": ({"split.count": 3}, "split.count is 3; known: 1"),
    "no size": ({"llama.embedding_length": None}, "the field 'llama.embedding_length' is missing"),
    "no end token": (
        {"tokenizer.ggml.eos_token_id": None},
        "the field 'tokenizer.ggml.eos_token_id' is missing",
    ),
    "a layer too few": (
        {"llama.block_count": LAYERS + 1},
        "tensor 'blk.2.attn_k.weight' is missing",
    ),
    "a layer too many": (
        {"llama.block_count": LAYERS - 1},
        "tensor 'blk.1.attn_k.weight' has no counterpart in a Llama model of 1 layers",
    ),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_what_would_compute_something_else_is_refused_by_name(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, case: str
) -> None:
    fields, why = WRONG_FIELDS[case]
    with pytest.raises(UnsupportedFile) as caught:
        converted(tmp_path, model, tokenizer, fields=fields)
    assert why in str(caught.value)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_exps"])
def test_a_tensor_of_another_family_is_refused_by_name(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, name: str
) -> None:
    with pytest.raises(UnsupportedFile, match=f"tensor '{name}' has no counterpart"):
        converted(tmp_path, model, tokenizer, tensors={name: np.ones(8, np.float32)})


def test_a_type_of_numbers_that_is_not_known_is_refused_by_name(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    whole_numbers = {"blk.0.attn_v.weight": np.ones((32, HIDDEN), np.int32)}
    with pytest.raises(UnsupportedFile, match=r"tensor 'blk.0.attn_v.weight' is I32"):
        converted(tmp_path, model, tokenizer, tensors=whole_numbers)


def test_a_cut_off_file_and_another_file_are_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    whole = write_gguf(tmp_path / "Tiny.gguf", model, tokenizer).read_bytes()
    for size in (0, 3, 4, 30, 5000, len(whole) - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(UnsupportedFile, match="not a whole GGUF file"):
            write_folder(cut, tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(UnsupportedFile, match="not a whole GGUF file"):
        write_folder(other, tmp_path)
