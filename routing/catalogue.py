"""What is known of models: rows of `data/models.toml`, and of an operator's own file.

Knows where a model comes from, not how to fetch it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from routing.errors import Code, Failure

ModelId = Annotated[str, Meta(pattern=r"^@[\w.-]+/[\w.-]+/[\w.-]+$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
SourceText = Annotated[str, Meta(pattern=r"^(pypi|hf|path):.")]


class ModelRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model, as an operator may offer it."""

    model: ModelId
    source: SourceText  # as `infire pull --source` takes it
    description: str
    licence: str
    precision: str  # what the weights really are, for people to read
    context_window: Annotated[int, Meta(gt=0)]  # tokens
    task: str = "text-generation"
    sha256: Digest | None = None  # of the fetched file
    model_digest: Digest | None = None  # of model.safetensors


class _File(Struct, forbid_unknown_fields=True):
    model: list[ModelRow] = []


@dataclass(frozen=True, slots=True)
class Catalogue:
    rows: Mapping[str, ModelRow]

    def row(self, model: str) -> ModelRow:
        """The row of `model`. Raises Failure(UNKNOWN_MODEL)."""
        try:
            return self.rows[model]
        except KeyError:
            raise Failure(Code.UNKNOWN_MODEL, f"No such model {model} or task") from None


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The packaged rows; those of the file at `path` are added, or replace them.

    Raises ValueError naming the file, the row and the field.
    """
    packaged = files("routing") / "data" / "models.toml"
    rows = _read("models.toml", packaged.read_text(encoding="utf-8"))
    if path is not None:
        rows |= _read(str(path), path.read_text(encoding="utf-8"))
    return Catalogue(rows)


def _read(name: str, text: str) -> dict[str, ModelRow]:
    try:
        found = msgspec.toml.decode(text, type=_File).model
    except msgspec.DecodeError as error:
        raise ValueError(f"{name}: {error}") from error
    rows: dict[str, ModelRow] = {}
    for row in found:
        if row.model in rows:
            raise ValueError(f"{name}: two rows for {row.model}")
        rows[row.model] = row
    return rows
