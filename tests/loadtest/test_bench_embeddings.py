"""The bench of vectors on a small model: a row of each kind of request, and the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from loadtest.bench.embeddings import app, least_cosine, texts_of, theirs


def small(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


def test_a_table(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["--model-dir", str(small(tmp_path)), "--rounds", "3", "--threads", "1"]
    )
    assert done.exception is None, done.exception
    rows = [line for line in done.output.splitlines() if " tokens |" in line]
    assert len(rows) == 5
    assert "3 rounds in turn" in done.output


def test_texts_are_padded_without_a_trace(tmp_path: Path) -> None:
    model = BertModel.from_pretrained(small(tmp_path)).eval()
    vectors, texts = theirs(model), texts_of(40, 3, 50, seed=1)
    assert {len(text) for text in texts} <= set(range(3, 51))
    alone = np.concatenate([vectors([text]) for text in texts])
    assert least_cosine(vectors(texts), alone) > 0.99999
