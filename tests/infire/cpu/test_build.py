"""Kernels compiled on first use, by one of all who ask; and what happens where they cannot be."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import infire.__main__ as process
from infire.__main__ import Settings
from infire.kernels.cpu import build
from infire.kernels.cpu.build import CannotBuild, library_path
from infire.once import make_once
from tests.infire.small_models import make_folder


def test_of_many_who_ask_one_makes_it(tmp_path: Path) -> None:
    path, made = tmp_path / "deep" / "thing", []

    def make(temporary: Path) -> None:
        made.append(temporary)
        temporary.write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: make_once(path, make), range(8)))
    assert found == [path] * 8
    assert len(made) == 1
    assert path.read_text() == "whole"


def test_what_could_not_be_made_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "thing"

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise CannotBuild("no")

    with pytest.raises(CannotBuild):
        make_once(path, fail)
    assert not path.exists()
    assert make_once(path, lambda temporary: temporary.write_text("whole") and None) == path


def test_sources_that_do_not_compile_say_why(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken.cpp").write_text("int f() { return nothing; }\n")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    with pytest.raises(CannotBuild, match="nothing"):
        library_path(tmp_path / "cache")


def test_without_a_compiler_torch_computes_and_one_warning_says_so(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    settings = Settings(
        fd=0,
        model="m",
        model_dir=make_folder("llama", tmp_path / "model"),
        device="cpu",
        dtype="bfloat16",
        kv_tokens=256,
        block_tokens=16,
        max_step_tokens=32,
        max_running=4,
        threads=1,
        weights="u12",
        max_draft_ids=0,
        prefix_cache=True,
        host_cache_bytes=0,
        disk_cache_dir=None,
        disk_cache_bytes=0,
        cache_dir=tmp_path / "cache",
    )
    with caplog.at_level(logging.WARNING):
        hello, _ = process.load(settings)
    assert (hello.device, hello.dtype) == ("cpu", "bfloat16")
    [record] = [it for it in caplog.records if "grammars" not in it.message]  # no tokenizer there
    assert "no-such-compiler" in record.getMessage()
