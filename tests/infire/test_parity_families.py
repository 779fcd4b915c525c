"""Each family of decoders against `transformers`, on small folders with random weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.infire.driving import answers, engine, loaded, sequence
from tests.infire.small_models import KINDS, VOCABULARY, greedy, make_folder, reference

_LENGTHS = (1, 17, 50, 133)  # prompts, in tokens; past every window


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(request.param, tmp_path)


def prompts() -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(VOCABULARY) for _ in range(length)] for length in _LENGTHS]


def test_greedy_ids_are_those_of_transformers(folder: Path) -> None:
    model = reference(folder)
    expected = {str(n): greedy(model, prompt, 24) for n, prompt in enumerate(prompts())}
    ours = loaded(folder)
    found = answers(
        engine(ours), *(sequence(str(n), prompt, 24) for n, prompt in enumerate(prompts()))
    )
    assert found == expected


@pytest.mark.parametrize("max_step_tokens", [7, 33])
def test_so_they_are_in_chunks_of_odd_sizes(folder: Path, max_step_tokens: int) -> None:
    model = reference(folder)
    expected = {str(n): greedy(model, prompt, 12) for n, prompt in enumerate(prompts())}
    ours = loaded(folder, block_tokens=5)
    found = answers(
        engine(ours, max_step_tokens=max_step_tokens),
        *(sequence(str(n), prompt, 12) for n, prompt in enumerate(prompts())),
    )
    assert found == expected
