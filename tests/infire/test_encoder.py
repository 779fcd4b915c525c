"""Encoders against `transformers`: small ones with random weights, and the default model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from infire.load_encoder import load_encoder
from infire.model.config import UnsupportedModel
from infire.model.encoder import Encoder
from infire.model.encoder_config import is_encoder, read_encoder
from infire.notes import Pooling
from tests.infire.small_models import make_folder

VOCABULARY = 97
_LENGTHS = (1, 40, 3, 17, 63, 17, 2, 55, 16, 24)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "type_vocab_size": 3,
    "max_position_embeddings": 70,
    "pad_token_id": 1,
}
_ROWS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, {}),
    "bert with a head": (BertConfig, BertForMaskedLM, {"hidden_act": "gelu_new"}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, {"layer_norm_eps": 1e-5}),
}


@pytest.fixture(params=_ROWS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config_class, model_class, changes = _ROWS[request.param]
    torch.manual_seed(7)
    model = model_class(config_class(**{**_SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # far from 0 and 1, so that one left out is noticed
                parameter.uniform_(0.5, 1.5) if "Norm" in name else parameter.uniform_(-1, 1)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


def texts() -> list[list[int]]:
    """No padding token among them: RoBERTa's positions would pass it over."""
    chance = random.Random(1)
    return [[chance.randrange(2, VOCABULARY) for _ in range(length)] for length in _LENGTHS]


def encoder(folder: Path) -> Encoder:
    return load_encoder(folder, device="cpu", dtype="float32", threads=1).model.encoder


@torch.inference_mode()
def by_transformers(model: PreTrainedModel, ids: Sequence[int], pooling: Pooling) -> torch.Tensor:
    found = model(torch.tensor([ids])).last_hidden_state[0]
    return normalize(found[0] if pooling == "cls" else found.mean(0), dim=0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_transformers(folder: Path, pooling: Pooling) -> None:
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    found = encoder(folder).vectors(texts(), [pooling] * len(_LENGTHS))
    for ids, vector in zip(texts(), found, strict=True):
        expected = by_transformers(model, ids, pooling)
        assert torch.allclose(vector, expected, atol=2e-5)
        assert cosine_similarity(vector, expected, dim=0) > 0.99999


def test_a_text_has_its_own_pooling_and_no_part_of_its_company(folder: Path) -> None:
    ours = encoder(folder)
    mixed: list[Pooling] = ["mean" if n % 3 else "cls" for n in range(len(_LENGTHS))]
    together = ours.vectors(texts(), mixed)
    for ids, pooling, vector in zip(texts(), mixed, together, strict=True):
        assert torch.allclose(vector, ours.vectors([ids], [pooling])[0], atol=1e-5)


def test_the_folder_says_how_vectors_are_pooled_and_scaled(folder: Path) -> None:
    assert (read_encoder(folder).pooling, read_encoder(folder).normalized) == ("mean", True)
    (folder / "pooling.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    found = encoder(folder).vectors(texts()[1:2], [None])[0]
    assert not torch.allclose(found.norm(), torch.tensor(1.0), atol=0.1)
    whole = encoder(folder).vectors(texts()[1:2], ["cls"])[0]
    assert torch.equal(found, whole)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key positions"),
        ({"hidden_act": "silu"}, "hidden_act silu"),
        ({"architectures": ["T5EncoderModel"]}, "architecture T5EncoderModel"),
        ({"is_decoder": True}, "is_decoder is set"),
    ],
)
def test_another_kind_is_refused(folder: Path, change: dict[str, Any], why: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match=why):
        encoder(folder)


def test_a_module_that_is_not_computed_is_refused(folder: Path) -> None:
    """As LaBSE has one, between pooling and normalizing."""
    names = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in names]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModel, match=r"models\.Dense; supported are"):
        encoder(folder)
    (folder / "modules.json").write_text(json.dumps([it for it in modules if it is not modules[2]]))
    assert read_encoder(folder).normalized


@pytest.mark.parametrize("where", ["models", "sentence_transformer.models"])
def test_modules_are_known_by_their_names_wherever_they_are(folder: Path, where: str) -> None:
    """Later versions of sentence-transformers have moved them."""
    modules = [{"type": f"sentence_transformers.{where}.{it}"} for it in ("Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert read_encoder(folder).normalized
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    assert not read_encoder(folder).normalized


def test_a_decoder_is_no_encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert is_encoder(folder)
    assert not is_encoder(make_folder("llama", tmp_path_factory.mktemp("llama")))


def test_the_default_model_is_that_of_transformers(minilm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = AutoModel.from_pretrained(minilm_folder).eval()
    said = ("A cat sat on the mat.", "Ein Satz.", "東京", "long " * 300, "One kitten was sitting.")
    ids = [tokenizer(text).input_ids for text in said]
    found = encoder(minilm_folder).vectors(ids, [None] * len(said))
    for text_ids, vector in zip(ids, found, strict=True):
        assert cosine_similarity(vector, by_transformers(model, text_ids, "mean"), dim=0) > 0.9999
    assert found[0] @ found[4] > 0.5 > 0.2 > found[0] @ found[3]
