"""The README of a region says what is so: its flags, its codes, its files."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from edge.settings import read_fleet
from origin_gpu.__main__ import app
from origin_gpu.engine_link import FRESH_S
from origin_gpu.settings import FrontSettings, WorkerSettings
from routing.children import TERM_S
from routing.drain import GRACE_S, LINGER_S
from routing.errors import Code
from routing.launch import CUT_S
from routing.serving import STOP_S

ORIGIN_GPU = Path(__file__).parents[2] / "origin_gpu"
README = (ORIGIN_GPU / "README.md").read_text()
STOPPING = README.partition("## Stopping")[2].partition("\n## ")[0]


def test_the_flags_have_their_defaults() -> None:
    rows = dict(re.findall(r"^\| `--(\w+)-s` \| .*? \| (\d+) \|", STOPPING, re.M))
    fields = WorkerSettings.__dataclass_fields__
    assert {name: float(text) for name, text in rows.items()} == {
        name: fields[f"{name}_s"].default for name in ("grace", "lease", "stuck")
    }
    assert FrontSettings.__dataclass_fields__["grace_s"].default == GRACE_S


def test_the_times_of_stopping_are_those_that_are_said() -> None:
    assert f"and {LINGER_S:g} s" in STOPPING
    assert f"no more work after {FRESH_S:g} s" in STOPPING
    assert f"all within `grace_s` and {CUT_S:g} s" in STOPPING
    assert max(STOP_S, TERM_S) < 5.0
    assert "within 5 s" in STOPPING
    assert f"`{Code.DRAINING}`" in STOPPING


def test_processes_can_be_started_by_hand_as_is_said(tmp_path: Path) -> None:
    by_hand = README.partition("## By hand")[2].partition("\n## ")[0]
    lines = by_hand.replace("\\\n", " ")
    for name in ("worker", "front"):
        [line] = re.findall(rf"^origin-gpu {name} .*", lines, re.M)
        taken = {flag for it in get_command(app).commands[name].params for flag in it.opts}
        assert {*re.findall(r"--[\w-]+", line)} <= taken
    [written] = re.findall(r"```toml\n(.*?)```", by_hand, re.S)
    (tmp_path / "edge.toml").write_text(written)
    (region,) = read_fleet(tmp_path / "edge.toml").regions
    assert (region.name, region.url) == ("weur", "http://127.0.0.1:9000")


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)`", README)
    assert named
    for name in named:
        assert (ORIGIN_GPU / name).exists() or (ORIGIN_GPU.parent / name).exists(), name
