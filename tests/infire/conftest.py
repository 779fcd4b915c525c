"""A small GGUF file, and where a pull puts its model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
    return tmp_path / "models" / "tiny"
