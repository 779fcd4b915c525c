"""`fleet pull`: a model of the catalogue, fetched by a process of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from routing.catalogue import ModelRow
from routing.paths import model_folder
from routing.pull import PullFailed, pull_model
from tests.fakes.small_gguf import small_llama, small_tokenizer, write_gguf

MODEL = "@cf/own/tiny"
PATIENCE_S = 120.0  # on a busy machine


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = small_tokenizer()
    file = tmp_path_factory.mktemp("source") / "Tiny.gguf"
    return write_gguf(file, small_llama(tokenizer), tokenizer)


def row(file: Path, **digests: str) -> ModelRow:
    return ModelRow(
        model=MODEL,
        source=f"path:{file}",
        description="Tiny.",
        licence="-",
        precision="BF16",
        context_window=128,
        **digests,
    )


@contextmanager
def fleet_pull(home: Path, file: Path) -> Iterator[subprocess.Popen[str]]:
    """`fleet pull` as it is typed, with a catalogue of one more row."""
    catalogue = home / "own.toml"
    fields = msgspec.to_builtins(row(file))
    lines = [f"{name} = {value!r}" for name, value in fields.items() if value is not None]
    catalogue.write_text("\n".join(["[[model]]", *lines]))
    pulling = subprocess.Popen(
        [sys.executable, "-m", "routing", "pull", MODEL, "--catalogue", str(catalogue)],
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield pulling
    finally:
        pulling.kill()
        pulling.communicate()


def test_the_folder_is_named_for_the_model(gguf: Path, tmp_path: Path) -> None:
    folder = pull_model(row(gguf), tmp_path)
    assert folder == model_folder(tmp_path, MODEL) == tmp_path / "models" / "@cf--own--tiny"
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("which", ["sha256", "model_digest"])
def test_the_digests_of_the_row_are_checked(
    gguf: Path, tmp_path: Path, which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PullFailed) as caught:
        pull_model(row(gguf, **{which: "0" * 64}), tmp_path)
    assert str(caught.value) == f"{MODEL} could not be fetched (exit code 1)"
    said = capfd.readouterr()
    assert f"expected {'0' * 64}" in said.err
    assert said.out == ""
    assert not model_folder(tmp_path, MODEL).exists()


@pytest.mark.system
def test_standard_output_is_the_folder_alone(gguf: Path, tmp_path: Path) -> None:
    for said in ("converting Tiny.gguf to BF16\n", ""):  # the second time there is nothing to do
        with fleet_pull(tmp_path, gguf) as pulling:
            out, err = pulling.communicate(timeout=PATIENCE_S)
        assert pulling.returncode == 0
        assert out == f"{model_folder(tmp_path / 'cache', MODEL)}\n"
        assert err == said


@pytest.mark.system
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_an_interrupt_ends_both_processes_with_a_line(
    gguf: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """While the child waits for another pull; only the parent is told."""
    folder = model_folder(tmp_path / "cache", MODEL)
    folder.parent.mkdir(parents=True)
    with ExitStack() as stack:
        lock = stack.enter_context((folder.parent / f".{folder.name}.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        pulling = stack.enter_context(fleet_pull(tmp_path, gguf))
        assert pulling.stderr is not None
        assert pulling.stderr.readline().startswith("waiting for another process")
        [child] = psutil.Process(pulling.pid).children()
        pulling.send_signal(how)
        out, err = pulling.communicate(timeout=PATIENCE_S)
        _, alive = psutil.wait_procs([child], timeout=PATIENCE_S)
    assert pulling.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert alive == []
    assert not folder.exists()
