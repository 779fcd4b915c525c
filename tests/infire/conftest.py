"""Models to pull and models that are pulled: a small GGUF file, and the default model's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from infire.pull import pull
from routing.catalogue import load_catalogue
from routing.paths import model_folder, paths
from tests.fakes.small_gguf import small_llama, small_tokenizer, write_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, not to be changed."""
    tokenizer = small_tokenizer()
    file = tmp_path_factory.mktemp("source") / "Tiny.gguf"
    return write_gguf(file, small_llama(tokenizer), tokenizer)


@pytest.fixture
def gguf(tiny: Path, tmp_path: Path) -> Path:
    """A GGUF file of this test's own."""
    file = tmp_path / "Tiny.gguf"
    shutil.copyfile(tiny, file)
    return file


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """Where a test's model is pulled to."""
    return tmp_path / "models" / "tiny"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model, in the user's cache; pulled if it is not there yet."""
    return _pulled("@cf/huggingfacetb/smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The default model of embeddings, likewise."""
    return _pulled("@cf/sentence-transformers/all-minilm-l6-v2")


def _pulled(model: str) -> Path:
    row = load_catalogue().row(model)
    folder = model_folder(paths(os.environ).cache, row.model)
    pull(row.source, folder, sha256=row.sha256, model_digest=row.model_digest)
    return folder
