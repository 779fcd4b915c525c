"""The command as people run it: a process, what it prints, how it ends."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unweight.bundles import bf16, bundle, file_of
from unweight.samples import trained_like


def unweight(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unweight", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def complained(done: subprocess.CompletedProcess[str]) -> str:
    """The one line it printed."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_there_and_back(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    content = file_of({"w.weight": bf16(trained_like(300, 1024, seed=0))})
    (model / "model.safetensors").write_bytes(content)
    (model / "config.json").write_text("{}")
    done = unweight("pack", model, tmp_path / "bundle", "--threads", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars where nobody looks
    size = (tmp_path / "bundle" / "model.safetensors").stat().st_size + 2
    assert done.stdout.startswith(f"2 files made, {len(content) + 2:,} to {size:,} bytes (6")
    done = unweight("pack", model, tmp_path / "bundle")
    assert done.stdout.startswith("everything is there already")
    done = unweight("check", tmp_path / "bundle")
    digest = hashlib.sha256(content).hexdigest()
    assert done.stdout.splitlines()[0] == f"{digest}  model.safetensors"
    assert done.stdout.splitlines()[1].startswith("whole; ")
    assert unweight("unpack", tmp_path / "bundle", tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == content
    assert (tmp_path / "again" / "config.json").read_text() == "{}"


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    whole = path.read_bytes()
    out = tmp_path / "out"
    assert complained(unweight("pack", tmp_path / "nowhere", out)) == (
        f"unweight pack: {tmp_path}/nowhere is not there"
    )
    assert "inside it" in complained(unweight("pack", tmp_path, tmp_path / "sub"))
    assert "packed already" in complained(unweight("pack", path, out))
    path.write_bytes(whole[:-5])
    for command in (("unpack", path, out), ("check", path), ("stat", path)):
        line = complained(unweight(*command))
        assert line.startswith(f"unweight {command[0]}: {path}: ")
    path.write_bytes(whole[:-400] + bytes([whole[-400] ^ 1]) + whole[-399:])
    assert str(path) in complained(unweight("check", path))
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    line = complained(unweight("unpack", tmp_path / "plain.safetensors", tmp_path / "file" / "x"))
    assert str(tmp_path) in line


def test_stat_is_a_table_a_picture_and_json(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights = trained_like(257, 1024, seed=0)
    path.write_bytes(
        file_of(
            {
                "m.weight": bf16(weights[:256]),
                "norm": bf16(weights[256]),
                "n": ("I8", (5,), b"12345"),
            }
        )
    )
    done = unweight("stat", path, "--png", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("m.weight"))
    assert line.split()[1:3] == ["BF16", "256x1024"]
    assert "2^-6" in done.stdout
    assert "█" in done.stdout
    assert "2 tensors, 1,029 weights, resident as they are" in done.stdout
    done = unweight("stat", path, "--json")
    found = json.loads(done.stdout)
    assert {tensor["name"] for tensor in found["tensors"]} == {"m.weight", "norm", "n"}
    assert sum(found["exponents"]) == 257 * 1024
    assert "norm" in unweight("stat", path, "--all").stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give one SOURCE, or --synthetic LAYER"),
        (("x", "--synthetic", "llama-3.1-8b-layer"), "give one SOURCE"),
        (("--synthetic", "gpt-9"), "'gpt-9' is not one of llama-3.1-8b-layer"),
        (("/nowhere/at/all",), "/nowhere/at/all is not there"),
    ],
)
def test_stat_of_nothing(arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in complained(unweight("stat", *arguments))


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    done = unweight("stat", bundle(tmp_path), "--png", tmp_path / "nowhere" / "x.png")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"unweight stat: {tmp_path}/nowhere/x.png: No such file or directory"
    ]


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'unweight';"
        "from unweight.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "stat", bundle(tmp_path), "--png", tmp_path / "x.png"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'edgefire[plots]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
