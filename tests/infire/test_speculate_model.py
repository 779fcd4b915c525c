"""Drafts with a real model in float32: the same ids with them and without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from infire.loaded import Loaded
from infire.plan import Row, SlotOpen, StepPlan
from infire.request import SamplingParams
from tests.infire.driving import answers, engine, loaded, sequence
from tests.infire.small_models import VOCABULARY, greedy, make_folder, reference

PROMPT = [5, 60, 100, 7, 200, 41, 9]
BLOCKS = (6, 2, 9, 4)  # of 4 tokens each
WORDS = (5, 60, 100, 41)  # all that is said in most tests: pairs recur soon, and go on otherwise
_FEW = {"logit_bias": tuple((token_id, 100.0) for token_id in WORDS)}
_SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": _FEW,
    "temperature 0.8": _FEW | {"temperature": 0.8, "seed": 11},
    "filtered": _FEW | {"temperature": 1.5, "top_k": 3, "top_p": 0.95, "seed": 5},
    "penalties": _FEW
    | {
        "temperature": 0.8,
        "seed": 12,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.02,
        "presence_penalty": 0.1,
    },
}


@pytest.fixture(scope="module", params=["llama", "mistral window"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Loaded:
    return loaded(folder)


def texts() -> dict[str, list[int]]:
    chance = random.Random(4)
    return {f"{count} ids": chance.choices(WORDS, k=count) for count in (3, 30, 150)}


@pytest.mark.parametrize("kind", _SAMPLING)
@pytest.mark.parametrize("together", [False, True])
def test_the_same_ids_with_drafts_and_without(model: Loaded, kind: str, together: bool) -> None:
    found = []
    for speculate in (False, True):
        asked = [
            sequence(name, ids, 60, speculate=speculate, **_SAMPLING[kind])
            for name, ids in texts().items()
        ]
        one = engine(model)
        if together:
            found.append(answers(one, *asked))
        else:
            found.append({each.request_id: answers(one, each)[each.request_id] for each in asked})
    assert found[0] == found[1]
    gauges = one.gauges()
    assert 10 < gauges.draft_tokens_accepted < gauges.draft_tokens_proposed


def test_the_same_ids_with_drafts_and_few_blocks(model: Loaded) -> None:
    """Preempted among themselves, where there is no window."""
    alone = {
        name: answers(engine(model), sequence(name, ids, 60, speculate=False, **_FEW))[name]
        for name, ids in texts().items()
    }
    crowded = engine(model, num_blocks=[18] * len(model.layout.groups))
    asked = [sequence(name, ids, 60, **_FEW) for name, ids in texts().items()]
    assert answers(crowded, *asked) == alone
    if model.layout.groups[0].window is None:
        assert crowded.gauges().preemptions > 0
    assert crowded.gauges().draft_tokens_accepted > 0


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_a_plan_by_hand(tmp_path: Path, num_right: int) -> None:
    """Right ids as drafts, then wrong ones, whose KV the next step writes over."""
    folder = make_folder("llama", tmp_path)
    model = loaded(folder, block_tokens=4, kv_tokens=64)
    expected = greedy(reference(folder), PROMPT, 8)
    sampling = SamplingParams(max_tokens=8, seed=3, temperature=0.0)
    opened = SlotOpen(slot=1, token_ids=tuple(PROMPT), num_prompt=7, sampling=sampling)
    first = Row(slot=1, start=0, num_new=7, ids=tuple(PROMPT), new_blocks=(BLOCKS,))
    assert model.runner.run(StepPlan(step=1, opens=(opened,), rows=(first,)))[0].ids == (
        expected[0],
    )
    wrong = tuple((i + 1) % VOCABULARY for i in expected[1 + num_right : 4])
    drafted = Row(
        slot=1,
        start=7,
        num_new=1,
        ids=(expected[0],),
        draft_ids=(*expected[1 : 1 + num_right], *wrong),
    )
    (result,) = model.runner.run(StepPlan(step=2, rows=(drafted,)))
    assert result.ids == tuple(expected[1 : 2 + num_right])
    then = Row(slot=1, start=8 + num_right, num_new=1, ids=result.ids[-1:])
    assert model.runner.run(StepPlan(step=3, rows=(then,)))[0].ids == (expected[2 + num_right],)
