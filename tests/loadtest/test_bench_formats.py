"""Two formats in turn: figures by hand, and a run on a model of a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infire.kernels.cpu.build import CannotBuild
from loadtest.bench.formats import Turns, measure, table
from tests.infire.small_models import make_folder


def test_ratios_are_turn_by_turn() -> None:
    turns = Turns(8, {"u12": [0.001, 0.002, 0.004], "bf16": [0.002, 0.003, 0.004]}, same_ids=True)
    assert turns.ratios() == [2, 1.5, 1]
    lines = table([turns]).splitlines()
    assert lines[-1] == "| 8 | 2.00 | 3.00 | 1.50x | 1.00 to 2.00 | yes |"


@pytest.mark.slow
def test_both_formats_say_the_same(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model", dtype=torch.bfloat16)
    try:
        found = measure(folder, 2, turns=2, threads=1, cache=tmp_path / "cache")
    except CannotBuild as error:
        pytest.skip(str(error))
    assert found.same_ids
    assert [len(times) for times in found.seconds.values()] == [2, 2]
    assert all(ratio > 0 for ratio in found.ratios())
