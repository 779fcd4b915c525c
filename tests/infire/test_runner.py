"""Plans made by hand: what a runner remembers of a slot, and which rows answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest

from infire.loaded import Loaded
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import SamplingParams
from tests.infire.driving import loaded
from tests.infire.small_models import greedy, make_folder, reference

PROMPT = [5, 60, 100, 7, 200, 41, 9]
BLOCKS = (6, 2, 9, 4)  # of 4 tokens each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Loaded:
    return loaded(folder, block_tokens=4, kv_tokens=64)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return greedy(reference(folder), PROMPT, 8)


def opens(slot: int, ids: Seq[int], num_prompt: int | None = None, **sampling: Any) -> SlotOpen:
    params = {"max_tokens": 8, "seed": 3, "temperature": 0.0} | sampling
    return SlotOpen(
        slot=slot,
        token_ids=tuple(ids),
        num_prompt=len(ids) if num_prompt is None else num_prompt,
        sampling=SamplingParams(**params),
    )


def row(slot: int, start: int, ids: Seq[int], blocks: Seq[int] = (), **more: Any) -> Row:
    new_blocks = (tuple(blocks),) if blocks else ()
    return Row(
        slot=slot, start=start, num_new=len(ids), ids=tuple(ids), new_blocks=new_blocks, **more
    )


def run(model: Loaded, *rows: Row, opened: Seq[SlotOpen] = ()) -> list[RowResult]:
    return list(model.runner.run(StepPlan(step=1, opens=tuple(opened), rows=rows)))


def test_a_prompt_and_then_token_by_token(model: Loaded, expected: list[int]) -> None:
    results = run(model, row(3, 0, PROMPT, BLOCKS), opened=[opens(3, PROMPT)])
    ids = list(results[0].ids)
    while len(ids) < 8:
        ids += run(model, row(3, len(PROMPT) + len(ids) - 1, ids[-1:]))[0].ids
    assert ids == expected


def test_inner_chunks_answer_nothing_and_blocks_come_when_needed(
    model: Loaded, expected: list[int]
) -> None:
    first = row(0, 0, PROMPT[:3], BLOCKS[:1], sample=False)
    assert run(model, first, opened=[opens(0, PROMPT)]) == [RowResult()]
    assert run(model, row(0, 3, PROMPT[3:5], BLOCKS[1:2], sample=False)) == [RowResult()]
    assert run(model, row(0, 5, PROMPT[5:]))[0].ids == (expected[0],)


def test_rows_answer_in_the_plans_order(model: Loaded, expected: list[int]) -> None:
    other = list(reversed(PROMPT))
    alone = run(model, row(1, 0, other, (12, 13)), opened=[opens(1, other)])[0]
    results = run(
        model,
        row(5, 0, other[:4], (14,), sample=False),
        row(0, 0, PROMPT, BLOCKS),
        row(1, 0, other, (12, 13)),
        opened=[opens(5, other), opens(1, other), opens(0, PROMPT)],
    )
    assert results == [RowResult(), RowResult((expected[0],)), alone]


def test_a_slot_begins_anew_with_each_tenant(model: Loaded, expected: list[int]) -> None:
    run(model, row(2, 0, [8] * 9, (1, 3, 5)), opened=[opens(2, [8] * 9, frequency_penalty=2.0)])
    results = run(model, row(2, 0, PROMPT, BLOCKS), opened=[opens(2, PROMPT)])
    assert results[0].ids == (expected[0],)


def test_what_was_generated_elsewhere_counts_as_output(model: Loaded) -> None:
    favourite = PROMPT[1]
    sampling = {"logit_bias": ((favourite, 1000.0),), "frequency_penalty": 2000.0}

    def answer(num_prompt: int) -> int:
        opened = opens(0, PROMPT, num_prompt, **sampling)
        return run(model, row(0, 0, PROMPT, BLOCKS), opened=[opened])[0].ids[0]

    assert answer(num_prompt=2) == favourite
    assert answer(num_prompt=1) != favourite


def test_kv_goes_to_other_blocks_through_a_file(
    model: Loaded, expected: list[int], tmp_path: Path
) -> None:
    path = str(tmp_path / "kv")
    first = run(model, row(0, 0, PROMPT, BLOCKS), opened=[opens(0, PROMPT)])[0].ids
    size = model.runner.export([BLOCKS[:2]], len(PROMPT), path)
    assert size == model.layout.exported_bytes(len(PROMPT)) == Path(path).stat().st_size
    run(model, row(1, 0, [8] * 16, BLOCKS), opened=[opens(1, [8] * 16)])  # writes over the KV
    model.runner.adopt([(11, 1)], len(PROMPT), path)
    opened = opens(0, [*PROMPT, *first], len(PROMPT))
    then = run(model, row(0, len(PROMPT), first, (11, 1)), opened=[opened])
    assert (*first, *then[0].ids) == tuple(expected[:2])
