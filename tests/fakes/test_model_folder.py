"""What `model_folder` promises to those who work out answers by hand."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tests.fakes.model_folder import CHAT_TEMPLATE, SPECIAL, make_counting_folder


def test_the_id_of_a_byte_is_the_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(make_counting_folder(tmp_path) / "tokenizer.json"))
    text = "say A\n\t~ é 漢 🙂"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([66, 67, 68]) == "BCD"
    assert [tokenizer.token_to_id(special) for special in SPECIAL] == [256, 257, 258]
    assert tokenizer.encode("<|im_end|>A").ids == [257, 65]
    assert tokenizer.get_vocab_size() == 259


def test_a_chat_has_the_ids_one_can_count(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(make_counting_folder(tmp_path) / "tokenizer.json"))
    messages = [{"role": "system", "content": "be é"}, {"role": "user", "content": "hi"}]
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    ids = tokenizer.encode(template.render(messages=messages, add_generation_prompt=True)).ids
    assert len(ids) == (3 + 6 + 5) + (3 + 4 + 2) + 2
    assert ids[-2:] == [256, ord("@")]  # so the answer begins with "A"


def test_the_manifest_names_every_file_by_its_digest(tmp_path: Path) -> None:
    folder = make_counting_folder(tmp_path / "new" / "folder")
    about = json.loads((folder / "edgefire.json").read_text())
    others = {path.name: path for path in folder.iterdir() if path.name != "edgefire.json"}
    assert about["files"] == {
        name: sha256(path.read_bytes()).hexdigest() for name, path in others.items()
    }
    assert about["model_digest"] == about["files"]["model.safetensors"]
