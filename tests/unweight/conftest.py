"""Bundles and folders that tests of several files have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unweight.bundles import bf16, bundle, file_of
from unweight.samples import trained_like


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return bundle(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One whose matrix is one short chunk."""
    return bundle(tmp_path, rows=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three files of a megabyte in four chunks, and a configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    for n in range(3):
        weights = trained_like(500, 1024, seed=n)
        (folder / f"model-{n}.safetensors").write_bytes(file_of({f"w{n}": bf16(weights)}))
    (folder / "config.json").write_text("{}")
    return folder
