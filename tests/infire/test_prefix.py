"""Sequences that begin alike share KV blocks, and nobody reads a block that is no longer his."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from infire.prefix import Chain, chain_keys, root
from infire.request import Sequence
from tests.fakes.runner import exported_kv
from tests.fakes.sequences import counted, sequence_of
from tests.infire.scheduling import Rig, held_in, shape

PROMPT = [7, 7, 9, 200, 3, 3, 3, 41, 5]  # two full blocks, and one token


def rig_of(num_blocks: int = 16, **settings: object) -> Rig:
    return Rig(num_blocks, prefix_cache=True, **settings)  # type: ignore[arg-type]


def salted(name: str, ids: list[int], max_tokens: int, salt: bytes) -> Sequence:
    made = sequence_of(name, ids, max_tokens)
    made.cache_salt = salt
    return made


def test_keys_are_of_all_that_came_before() -> None:
    start = root(b"salt", "model", None)
    keys = chain_keys(start, PROMPT, 4)
    assert len(keys) == 2
    assert chain_keys(start, [*PROMPT, 1, 2, 3], 4)[:2] == keys
    other = chain_keys(start, [8, *PROMPT[1:]], 4)
    assert not {*other} & {*keys}
    assert Chain(start, 4).keys(PROMPT, 1) == keys[:1]


@pytest.mark.parametrize(
    "other",
    [(b"other", "model", None), (b"salt", "other", None), (b"salt", "model", "adapter")],
    ids=["tenant", "model", "adapter"],
)
def test_tenants_models_and_adapters_have_keys_of_their_own(
    other: tuple[bytes, str, str | None],
) -> None:
    mine = chain_keys(root(b"salt", "model", None), PROMPT, 4)
    assert not {*mine} & {*chain_keys(root(*other), PROMPT, 4)}


def test_the_same_prompt_again_computes_its_last_block_only() -> None:
    rig = rig_of()
    rig.scheduler.add(sequence_of("first", PROMPT, 3))
    assert rig.run_out()["first"] == counted(5, 3)
    rig.scheduler.add(sequence_of("second", PROMPT, 3))
    plan = rig.plan()
    assert shape(plan) == [(0, 1)]
    (step,) = rig.finish(plan)
    assert step.cached_tokens == 8
    assert rig.run_out()["second"] == counted(5, 3)[1:]
    assert rig.scheduler.gauges().prompt_tokens_cached == 8
    assert rig.num_free == 16


def test_a_whole_number_of_blocks_leaves_the_last_to_be_computed() -> None:
    rig = rig_of()
    for name in ("first", "second"):
        rig.scheduler.add(sequence_of(name, PROMPT[:8], 1))
        plan = rig.plan()
        rig.finish(plan)
    assert shape(plan) == [(0, 4)]


def test_blocks_are_shared_while_both_run() -> None:
    rig = rig_of()
    rig.scheduler.add(sequence_of("first", PROMPT, 9))
    rig.step()
    rig.scheduler.add(sequence_of("second", PROMPT, 9))
    rig.step()
    assert rig.num_free == 16 - 3 - 1
    rig.drop("first")
    assert rig.num_free == 16 - 3
    assert rig.run_out()["second"] == counted(5, 9)[1:]


def test_output_is_found_by_the_next_turn() -> None:
    rig = rig_of()
    rig.scheduler.add(sequence_of("first", PROMPT, 8))
    said = rig.run_out()["first"]
    rig.scheduler.add(sequence_of("next", [*PROMPT, *said, 1, 2], 1))
    (step,) = rig.step()
    assert step.cached_tokens == 16  # of 16 whose KV was computed: the last id said had none


def test_another_tenant_finds_nothing() -> None:
    rig = rig_of()
    for salt in (b"one", b"two"):
        rig.scheduler.add(salted(salt.decode(), PROMPT, 1, salt))
        (step,) = rig.step()
        assert step.cached_tokens == 0
    rig.scheduler.add(salted("again", PROMPT, 1, b"one"))
    (step,) = rig.step()
    assert step.cached_tokens == 8


def test_the_block_unused_for_longest_goes_first_and_ends_before_beginnings() -> None:
    rig = rig_of(6)
    rig.scheduler.add(sequence_of("old", PROMPT, 1))  # leaves 2 keyed blocks
    rig.run_out()
    rig.scheduler.add(sequence_of("big", [200] * 20, 1))  # takes 5: the 4 free, and one of these
    rig.run_out()
    rig.scheduler.add(sequence_of("again", PROMPT, 1))
    (step,) = rig.step()
    assert step.cached_tokens == 4


def test_what_one_window_has_forgotten_is_still_found() -> None:
    rig = rig_of(windows=(None, 6))
    for name in ("first", "second"):
        rig.scheduler.add(sequence_of(name, [*range(20, 41)], 2))
        assert rig.run_out()[name] == [41, 42]
    assert rig.scheduler.gauges().prompt_tokens_cached == 20


@pytest.mark.parametrize("windows", [(6,), (None, 6)])
def test_of_a_block_that_came_in_part_nothing_is_found(
    windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    """After 7 tokens a window of 6 sees from the third on: so much of the first block is there."""
    rig = rig_of(windows=windows)
    ids = [*range(20, 29)]
    rig.scheduler.add(sequence_of("adopted", ids, 4), num_adopted=7)
    (adoption,) = rig.scheduler.place()
    path = tmp_path / "kv"
    path.write_bytes(exported_kv(rig.layout, ids[:7]))
    rig.runner.adopt(adoption.block_ids, 7, str(path))
    assert rig.run_out()["adopted"] == counted(28, 4)
    rig.scheduler.add(sequence_of("short", ids[:5], 1))
    assert rig.run_out()["short"] == [25]
    assert rig.scheduler.gauges().prompt_tokens_cached == 0
    rig.scheduler.add(sequence_of("long", [*ids, *counted(28, 4)], 1))
    (step,) = rig.step()
    assert step.cached_tokens == 12  # whose window begins in a block that is there as a whole


def test_without_a_cache_nothing_is_found() -> None:
    rig = Rig(prefix_cache=False)
    for name in ("first", "second"):
        rig.scheduler.add(sequence_of(name, PROMPT, 1))
        (step,) = rig.step()
        assert step.cached_tokens == 0


def test_a_block_that_was_handed_out_again_fails_its_reader_alone() -> None:
    rig = rig_of()
    rig.scheduler.add(sequence_of("robbed", PROMPT, 9))
    rig.scheduler.add(sequence_of("neighbour", [90, 91], 9))
    rig.step()
    rig.runner.tags.carried[0][rig.scheduler._entries["robbed"].seq.block_ids[0][1]] += 1
    steps = rig.step()
    assert [step.request_id for step in steps] == ["neighbour"]
    assert rig.scheduler.take_lost() == [("robbed", "")]
    assert rig.scheduler.take_lost() == []
    assert rig.run_out()["neighbour"] == counted(91, 9)[2:]
    assert rig.num_free == 16


def test_a_held_sequence_that_lost_a_block_is_not_exported() -> None:
    rig = rig_of()
    rig.scheduler.add(sequence_of("held", PROMPT, 1, hold=True))
    rig.run_out()
    seq = held_in(rig.scheduler, "held")
    assert seq is not None
    rig.pools[0].tags[seq.block_ids[0][0]] += 1
    assert held_in(rig.scheduler, "held") is None


@pytest.mark.parametrize("seed", range(4))
def test_conversations_find_what_was_said_before(seed: int) -> None:
    """Turn after turn of several at once: every answer right, most of each prompt found."""
    rng = random.Random(seed)
    rig = rig_of(200)
    talks = [[rng.randrange(256) for _ in range(rng.randint(5, 30))] for _ in range(6)]
    asked = 0
    for turn in range(5):
        for n, talk in enumerate(talks):
            rig.scheduler.add(sequence_of(f"{n}-{turn}", talk, 6))
            asked += len(talk)
        for name, said in rig.run_out().items():
            talk = talks[int(name.split("-")[0])]
            assert said == counted(talk[-1], 6)
            talk += [*said, *(rng.randrange(256) for _ in range(4))]
    gauges = rig.scheduler.gauges()
    assert gauges.prompt_tokens_cached + gauges.prompt_tokens_computed == asked
    assert gauges.prompt_tokens_cached > asked / 2
