"""What is known of models: rows of `data/models.toml`, and of an operator's own file.

Knows where a model comes from, not how to fetch it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from routing.errors import Code, Failure
from routing.region import Task


class CatalogueError(ValueError):
    """A catalogue that cannot be used: which file, which row, which field, and why."""


ModelId = Annotated[str, Meta(pattern=r"^@[\w.-]+/[\w.-]+/[\w.-]+$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
SourceText = Annotated[str, Meta(pattern=r"^(pypi|hf|path):.")]
Words = Annotated[str, Meta(min_length=1)]


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a million tokens cost, in neurons (1,000 of which are 0.011 USD at Workers AI)."""

    input: Annotated[float, Meta(ge=0)]
    output: Annotated[float, Meta(ge=0)] = 0.0
    cached: Annotated[float, Meta(ge=0)] | None = None  # of the prompt; None: a fifth of `input`


class ModelRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model, as an operator may offer it."""

    model: ModelId
    source: SourceText  # as `infire pull --source` takes it
    description: Words
    licence: Words
    precision: Words  # what the weights really are, for people to read
    context_window: Annotated[int, Meta(gt=0)]  # tokens
    task: Task = "text-generation"
    price: Price | None = None  # None: derived from the model's size
    sha256: Digest | None = None  # of the fetched file
    model_digest: Digest | None = None  # SHA-256 of the model folder's weights


@dataclass(frozen=True, slots=True)
class Catalogue:
    rows: Mapping[str, ModelRow]

    def row(self, model: str) -> ModelRow:
        """The row of `model`. Raises Failure(UNKNOWN_MODEL)."""
        try:
            return self.rows[model]
        except KeyError:
            known = ", ".join(sorted(self.rows))
            raise Failure(
                Code.UNKNOWN_MODEL, f"{model} is not in the catalogue; known: {known}"
            ) from None


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The packaged rows; those of the file at `path` are added, or replace them.

    Raises CatalogueError.
    """
    packaged = files("routing") / "data" / "models.toml"
    rows = _read("models.toml", packaged.read_text(encoding="utf-8"))
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogueError(f"{path}: cannot be read: {error}") from error
        rows |= _read(str(path), text)
    return Catalogue(rows)


def _read(name: str, text: str) -> dict[str, ModelRow]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{name}: not TOML: {error}") from error
    if others := sorted(table.keys() - {"model"}):
        raise CatalogueError(f"{name}: {others[0]}: unknown; every row is a [[model]]")
    found = table.get("model", [])
    if not isinstance(found, list):
        raise CatalogueError(f"{name}: model: is [model] where [[model]] is meant")
    rows: dict[str, ModelRow] = {}
    for number, fields in enumerate(found, 1):
        row = _row(f"{name}: model {number}", fields)
        if row.model in rows:
            raise CatalogueError(
                f"{name}: model {number} ({row.model}): model: used by a row above"
            )
        rows[row.model] = row
    return rows


def _row(place: str, fields: Any) -> ModelRow:
    try:
        return msgspec.convert(fields, ModelRow)
    except msgspec.ValidationError as error:
        known_as = fields.get("model") if isinstance(fields, dict) else None
        # msgspec says `reason - at `$.field``, and nothing after it for a field that is missing
        reason, _, field = str(error).partition(" - at `$.")
        words = [f"{place} ({known_as})" if known_as else place, *([field[:-1]] if field else [])]
        raise CatalogueError(": ".join([*words, reason[:1].lower() + reason[1:]])) from error
