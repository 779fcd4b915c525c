"""What a worker reads of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from origin_gpu.models import FolderError, read_assets
from tests.fakes.model_folder import CHAT_TEMPLATE, END_ID, SPECIAL, make_counting_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_counting_folder(tmp_path)


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None: remove."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_folder_as_it_is_pulled(folder: Path) -> None:
    assets = read_assets(folder)
    assert assets.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    assert assets.chat_template == CHAT_TEMPLATE
    assert assets.special_tokens == {"eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    assert assets.stop_ids == (END_ID,)
    assert assets.digest == read_assets(folder).digest


def test_every_byte_counts_for_the_digest(folder: Path) -> None:
    before = read_assets(folder).digest
    change(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATE + " ")
    assert read_assets(folder).digest != before


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, (5, END_ID)),
        (None, [7, 6], (6, 7, END_ID)),
        (5, 6, (5, 6, END_ID)),
        ([5, 6], [6, 7], (5, 6, 7, END_ID)),
        (None, None, (END_ID,)),
    ],
)
def test_stop_ids_are_all_that_any_file_names(
    folder: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    change(folder / "config.json", eos_token_id=config)
    change(folder / "generation_config.json", eos_token_id=generation)
    assert read_assets(folder).stop_ids == expected


def test_a_model_need_not_say_how_it_generates(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert read_assets(folder).stop_ids == (END_ID,)


def test_special_tokens_may_be_tables(folder: Path) -> None:
    token = {"content": SPECIAL[2], "lstrip": False, "special": True}
    change(folder / "tokenizer_config.json", eos_token=token, bos_token=None)
    assets = read_assets(folder)
    assert assets.special_tokens["eos_token"] == SPECIAL[2]
    assert assets.stop_ids == (END_ID, END_ID + 1)


def test_a_template_in_a_file_of_its_own_goes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }} ü", encoding="utf-8")
    assert read_assets(folder).chat_template == "{{ messages }} ü"


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert read_assets(folder).chat_template == "d"


def test_a_base_model_has_no_template(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=None)
    assert read_assets(folder).chat_template == ""


def test_advice_on_sampling_is_for_models_that_sample(folder: Path) -> None:
    advice = {"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.1, "top_p": 0.9}
    change(folder / "generation_config.json", do_sample=True, **advice, max_length=20)
    assert read_assets(folder).generation_defaults == advice
    for do_sample in (False, None):
        change(folder / "generation_config.json", do_sample=do_sample)
        assert read_assets(folder).generation_defaults == {}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FolderError, match=rf"{name} cannot be read: No such file"):
        read_assets(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "truncated"),
        ("config.json", "[]", "object"),
        ("config.json", '{"eos_token_id": "two"}', r"\$\.eos_token_id"),
        ("generation_config.json", '{"temperature": "hot"}', r"\$\.temperature"),
        ("tokenizer_config.json", '{"chat_template": 3}', r"\$\.chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "template"),
        ("tokenizer.json", '{"added_tokens": [{"id": 1}]}', "content"),
        ("tokenizer.json", "\xff", "tokenizer.json"),
        ("chat_template.jinja", "\xff", "chat_template.jinja"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    folder: Path, name: str, content: str, said: str
) -> None:
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(FolderError, match=said) as wrong:
        read_assets(folder)
    assert str(folder / name) in str(wrong.value)
