"""One request, computed in every way there is: its ids are always the same, drawn or greedy.

With torch in float32; with the compiled kernels in bfloat16, where each result is the same bit by
bit whatever it is computed together with. What is compared with is the request alone, in as few
steps as can be; that those are the ids of `transformers` is shown elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infire.loaded import Loaded
from infire.notes import Adopted, Exported
from tests.infire.driving import (
    answers,
    engine,
    finish,
    loaded,
    loaded_native,
    neighbours,
    sequence,
)
from tests.infire.prompts import prompts
from tests.infire.small_models import VOCABULARY, make_folder

_SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8, "seed": 11},
    "all knobs": {
        "temperature": 0.8,
        "seed": 12,
        "top_k": 40,
        "top_p": 0.92,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
    },
}


@dataclass
class World:
    ours: Loaded
    other: Loaded  # the same folder, loaded once more, with blocks of another size
    prompts: dict[str, list[int]]
    max_tokens: int
    alone: dict[str, dict[str, list[int]]]  # by sampling, by prompt


def make_world(folder: Path, asked: dict[str, list[int]], max_tokens: int, device: str) -> World:
    def load(**settings: Any) -> Loaded:
        if device == "native":
            return loaded_native(folder, **settings)
        return loaded(folder, device=device, **settings)

    ours = load()
    alone = {
        kind: {
            name: answers(engine(ours), sequence(name, ids, max_tokens, **sampling))[name]
            for name, ids in asked.items()
        }
        for kind, sampling in _SAMPLING.items()
    }
    other = load(block_tokens=24)
    return World(ours=ours, other=other, prompts=asked, max_tokens=max_tokens, alone=alone)


def small_world(kind: str, folder: Path, device: str = "cpu") -> World:
    chance = random.Random(6)
    asked = {
        f"{length} tokens": [chance.randrange(VOCABULARY) for _ in range(length)]
        for length in (1, 16, 45, 200)
    }
    return make_world(make_folder(kind, folder), asked, 20, device)


def real_world(folder: Path, device: str = "cpu") -> World:
    asked = prompts(folder)
    names = ("short 0", "short 6", "unicode 4", "300 tokens of prose")
    return make_world(folder, {name: asked[name] for name in names}, 32, device)


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        "mistral window",
        "qwen2 windows",
        "llama native",
        "mistral window native",
        "qwen2 windows native",
        "qwen3 tied biases native",
        pytest.param("llama cuda", marks=pytest.mark.gpu),
        pytest.param("smollm2", marks=pytest.mark.slow),
        "smollm2 native",
        pytest.param("smollm2 cuda", marks=pytest.mark.gpu),
    ],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    kind, device = request.param, "cpu"
    for other in ("cuda", "native"):
        if kind.endswith(f" {other}"):
            kind, device = kind.removesuffix(f" {other}"), other
    if kind == "smollm2":
        return real_world(request.getfixturevalue("smollm2_folder"), device)
    return small_world(kind, tmp_path_factory.mktemp("model"), device)


@pytest.fixture(params=_SAMPLING)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_with_15_others(world: World, kind: str) -> None:
    """Which ask for other things, begin and end when they like, and may take part of each step."""
    mine = [
        sequence(name, ids, world.max_tokens, **_SAMPLING[kind])
        for name, ids in world.prompts.items()
    ]
    others = neighbours(16 - len(mine), world.ours.vocab_size, world.max_tokens)
    mixed = [*others, *mine]
    random.Random(8).shuffle(mixed)
    found = answers(engine(world.ours), *mixed)
    assert {name: found[name] for name in world.prompts} == world.alone[kind]


@pytest.mark.parametrize("max_step_tokens", [7, 33, 61])
def test_in_chunks_of_odd_sizes(world: World, kind: str, max_step_tokens: int) -> None:
    """All at once, so that chunks and single tokens share steps."""
    found = answers(
        engine(world.ours, max_step_tokens=max_step_tokens),
        *(
            sequence(name, ids, world.max_tokens, **_SAMPLING[kind])
            for name, ids in world.prompts.items()
        ),
    )
    assert found == world.alone[kind]


def test_preempted(world: World, kind: str) -> None:
    """With room for all as they come, but not as they grow; drafts could end one before that."""
    group = world.ours.layout.groups[0]
    if group.window is not None:
        pytest.skip("what lies in windows only does not grow")
    num_first = sum(-(-len(ids) // group.block_tokens) for ids in world.prompts.values())
    crowded = engine(
        world.ours,
        num_blocks=[num_first + len(world.prompts) - 1, *world.ours.num_blocks[1:]],
    )
    found = answers(
        crowded,
        *(
            sequence(name, ids, world.max_tokens, speculate=False, **_SAMPLING[kind])
            for name, ids in world.prompts.items()
        ),
    )
    assert found == world.alone[kind]
    assert crowded.gauges().preemptions > 0


@pytest.mark.parametrize("num_first", [1, 6])
def test_handed_over_to_another_engine(
    world: World, kind: str, num_first: int, tmp_path: Path
) -> None:
    """One engine computes the prompt and says so many ids; the other gets its KV, and goes on."""
    prefill, decode = engine(world.ours), engine(world.other)
    sampling = _SAMPLING[kind]
    for n, (name, ids) in enumerate(world.prompts.items()):
        path = str(tmp_path / str(n))
        held = sequence(name, ids, num_first, hold=True, **sampling)
        prefill.submit(held, export_path=path)
        first: list[int] = []
        ends: list[int] = []
        while results := prefill.step():
            first += [i for step in results.steps for i in step.ids]
            ends += [it.num_tokens for it in results.answers if isinstance(it, Exported)]
        resumed = sequence(name, ids, world.max_tokens, **sampling)
        resumed.token_ids += first
        num_adopted = len(ids) + num_first - 1
        decode.submit(resumed, path, num_adopted, piece_ends=tuple(ends))
        adopted = decode.step()
        assert adopted
        assert adopted.answers == (Adopted(name),)
        prefill.drop(name)
        then = list(adopted.steps[0].ids) + finish(decode)[name]
        assert first + then == world.alone[kind][name]
        assert decode.gauges().prompt_tokens_computed == 0


def test_resumed_without_its_kv(world: World, kind: str) -> None:
    for name, ids in world.prompts.items():
        expected = world.alone[kind][name]
        resumed = sequence(name, ids, world.max_tokens, **_SAMPLING[kind])
        resumed.token_ids += expected[:5]
        assert answers(engine(world.other), resumed)[name] == expected[5:]


def test_a_seed_is_not_another(world: World) -> None:
    """That the draws above are draws."""
    name, ids = next(iter(world.prompts.items()))
    found = answers(
        engine(world.ours), sequence(name, ids, world.max_tokens, temperature=0.8, seed=99)
    )
    assert found[name] != world.alone["temperature 0.8"][name]
