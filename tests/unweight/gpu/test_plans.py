"""Plans on disk, and how they are found by a clock that a person can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unweight.gpu.plans import (
    BUCKETS,
    BadPlans,
    Launch,
    Pipeline,
    Plans,
    bucket,
    default_plan,
    file_name,
    find,
    load,
    save,
)
from unweight.gpu.tune import choose, crossover, gain, launches, remeasure, splits


def plans() -> Plans:
    return Plans(gpu="Some GPU", measured="today", shapes={(64, 128): default_plan(64, 128)})


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, 16), (16, 16), (17, 32), (256, 256), (257, 512), (9999, 4096)]
)
def test_buckets(num_rows: int, expected: int) -> None:
    assert bucket(num_rows) == expected


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    save(plans(), tmp_path / file_name("Some GPU"))
    assert file_name("Some GPU") == "Some_GPU.json"
    assert find("Some GPU", tmp_path) == plans()
    assert [path.name for path in tmp_path.iterdir()] == ["Some_GPU.json"]


def test_a_gpu_nobody_measured_has_rules_of_thumb(tmp_path: Path) -> None:
    found = find("Another GPU", tmp_path)
    assert found.shapes == {}
    plan = found.plan(4096, 4096)
    assert plan.split == 4  # 64 blocks of outputs: 4 times as many are about 2 a multiprocessor
    assert plan.choice(1).pipeline is Pipeline.FUSED
    assert plan.choice(2048).pipeline is Pipeline.DECODED
    assert found.plan(128256, 4096).split == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("shapes"), "shapes"),
        (lambda c: c["shapes"][0].update(split=0), "split 0"),
        (lambda c: c["shapes"][0]["choices"].pop("16"), "buckets"),
        (lambda c: c["shapes"][0]["choices"]["16"].update(launch=None), "16 rows"),
        (lambda c: c["shapes"][0]["choices"]["16"].update(pipeline="guess"), "guess"),
        (lambda c: c["shapes"][0]["choices"]["16"]["launch"].update(warps=3), "warps=3"),
        (lambda c: c["shapes"][0]["choices"]["16"]["launch"].update(block_n=48), "block_n=48"),
        (lambda c: c["shapes"][0]["choices"]["16"]["launch"].update(more=1), "more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_one_of_plans(tmp_path: Path, change: object, complaint: str) -> None:
    path = tmp_path / "plans.json"
    save(plans(), path)
    content = json.loads(path.read_text())
    assert callable(change)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadPlans, match=complaint):
        load(path)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text("{")
    with pytest.raises(BadPlans, match=r"plans\.json"):
        load(path)


def by_hand(pipeline: Pipeline, split: int, launch: Launch | None, num_rows: int) -> float | None:
    """Fused takes a microsecond a row, least in 2 ranges, with 3 stages and without starting early,
    and does not fit with 5; decoding takes 100, and as long as BF16 after it: 10 and a tenth."""
    if launch is None:
        return 10 + num_rows / 10 + (100 if pipeline is Pipeline.DECODED else 0)
    if launch.stages == 5:
        return None
    return num_rows + abs(split - 2) + abs(launch.stages - 3) + launch.early + launch.block_n / 1e3


def test_the_fastest_is_chosen() -> None:
    plan = choose(by_hand, [1, 2, 4])
    assert plan.split == 2
    launch = plan.choice(1).launch
    assert launch == Launch(block_n=64, block_m=16, warps=4, stages=3, early=False)
    assert crossover(plan) == 128  # 110 + 12.8 us, where fused takes 128
    assert plan.choice(64).times_us == {"fused": 64.06, "decoded": 116.4, "raw": 16.4}
    assert gain(plan, 5) == pytest.approx(11.6 / 16.06, abs=1e-3)
    assert set(plan.choices) == set(BUCKETS)
    assert plan.choice(4096).launch is None


def test_where_nothing_can_be_launched_it_is_decoded() -> None:
    plan = choose(lambda pipeline, *_: None if pipeline is Pipeline.FUSED else 1.0, [1])
    assert crossover(plan) == 16


@pytest.mark.parametrize("num_rows", [16, 32, 64, 128, 256])
def test_launches_fit_and_take_one_kind_of_instruction(num_rows: int) -> None:
    some = launches(num_rows)
    assert len(some) == len(set(some)) > 1
    for launch in some:
        assert launch.warps >= 4
        assert launch.stages * (launch.block_n * 192 + launch.block_m * 256) <= 220 * 1024


def test_splits() -> None:
    assert splits(4096, 4096) == [1, 2, 4]  # 32 tiles: 8 ranges would be of 4
    assert splits(4096, 14336) == [1, 2, 4, 8]
    assert splits(28672, 4096) == [1]
    assert splits(64, 128) == [1]


def test_known_launches_are_timed_again_and_may_lose() -> None:
    known = default_plan(4096, 4096)
    asked: list[tuple[Pipeline, int, int]] = []

    def timer(pipeline: Pipeline, split: int, launch: Launch | None, num_rows: int) -> float | None:
        asked.append((pipeline, split, num_rows))
        if pipeline is Pipeline.FUSED:
            assert launch == known.choice(min(num_rows, 128)).launch
            return None if num_rows == 128 else num_rows / 16
        return 3.0 if pipeline is Pipeline.DECODED else 2.0

    found = remeasure(timer, known)
    assert found.split == known.split
    fused = {size for size, choice in found.choices.items() if choice.pipeline is Pipeline.FUSED}
    assert fused == {16, 32}  # 1 and 2; 64 rows would take 4, and decoding first takes 3
    assert found.choices[16].launch == known.choices[16].launch
    assert found.choices[128].times_us == {"decoded": 3.0, "raw": 2.0}
    assert (Pipeline.FUSED, 4, 1024) in asked
    assert (Pipeline.FUSED, 4, 2048) not in asked
