"""A model that is on this machine already, as a Hugging Face style folder, is pulled too."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from infire.pull import MANIFEST, pull
from infire.sources import PullError
from tests.infire.pulled import NAMES, beside, manifest, names


@pytest.fixture
def snapshot(tiny: Path, tmp_path: Path) -> Path:
    """A Hugging Face style folder, with weights of other formats and other people's files."""
    folder = tmp_path / "snapshot"
    pull(f"path:{tiny}", folder)
    (folder / MANIFEST).unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE.txt").write_text("yours")
    for name in ("pytorch_model.bin", "consolidated.00.safetensors", "run.py", ".hidden"):
        (folder / name).write_bytes(b"no")
    (folder / "onnx").mkdir()
    return folder


class TestALocalFolder:
    def test_gives_the_model_and_nothing_else(self, snapshot: Path, into: Path) -> None:
        pull(f"path:{snapshot}", into)
        assert names(into) == sorted([*NAMES, "LICENSE.txt", "chat_template.jinja"])
        AutoModelForCausalLM.from_pretrained(into)

    def test_gives_its_weights_without_a_copy(self, snapshot: Path, into: Path) -> None:
        pull(f"path:{snapshot}", into)
        assert (into / "model.safetensors").samefile(snapshot / "model.safetensors")
        assert not (into / "config.json").samefile(snapshot / "config.json")

    def test_of_links_gives_what_they_lead_to(
        self, snapshot: Path, into: Path, tmp_path: Path
    ) -> None:
        """As the hub's cache is."""
        links = tmp_path / "links"
        links.mkdir()
        for file in snapshot.iterdir():
            (links / file.name).symlink_to(file)
        pull(f"path:{links}", into)
        assert not any(path.is_symlink() for path in into.iterdir())
        assert (into / "model.safetensors").samefile(snapshot / "model.safetensors")

    def test_is_copied_where_it_cannot_be_linked(
        self, snapshot: Path, into: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        pull(f"path:{snapshot}", into)
        weights = into / "model.safetensors"
        assert not weights.samefile(snapshot / "model.safetensors")
        assert weights.read_bytes() == (snapshot / "model.safetensors").read_bytes()

    def test_that_changed_is_taken_again(self, snapshot: Path, into: Path) -> None:
        pull(f"path:{snapshot}", into)
        (snapshot / "chat_template.jinja").write_text("{{ other }}")
        pull(f"path:{snapshot}", into)
        assert (into / "chat_template.jinja").read_text() == "{{ other }}"

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    )
    def test_without_a_needed_file_is_refused(self, snapshot: Path, into: Path, name: str) -> None:
        (snapshot / name).unlink()
        with pytest.raises(PullError, match=f"^path:{snapshot} holds no {name}$"):
            pull(f"path:{snapshot}", into)
        assert not into.exists()
        assert beside(into) == []

    def test_has_no_sha256(self, snapshot: Path, into: Path) -> None:
        with pytest.raises(PullError, match="is a folder"):
            pull(f"path:{snapshot}", into, sha256="0" * 64)


class TestWeightsInSeveralFiles:
    @pytest.fixture
    def shards(self, snapshot: Path) -> Path:
        model = AutoModelForCausalLM.from_pretrained(snapshot)
        (snapshot / "model.safetensors").unlink()
        model.save_pretrained(snapshot, max_shard_size="200KB")
        assert len(list(snapshot.glob("model-*.safetensors"))) > 2
        return snapshot

    def test_have_one_digest(self, shards: Path, into: Path) -> None:
        pull(f"path:{shards}", into)
        files = sorted(shards.glob("model-*.safetensors"))
        expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        assert manifest(into).model_digest == expected
        AutoModelForCausalLM.from_pretrained(into)

    def test_are_all_needed(self, shards: Path, into: Path) -> None:
        gone = sorted(shards.glob("model-*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(PullError, match=f"holds no {gone.name}"):
            pull(f"path:{shards}", into)
        assert not into.exists()

    def test_need_an_index_that_can_be_read(self, shards: Path, into: Path) -> None:
        (shards / "model.safetensors.index.json").write_text('{"weight_map": [')
        with pytest.raises(PullError, match=r"^model.safetensors.index.json: "):
            pull(f"path:{shards}", into)
