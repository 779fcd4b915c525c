"""Who goes first, who gives way, and that nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

from infire.tenants import MAX_OVERTAKEN, MAX_PREEMPTIONS
from tests.fakes.runner import exported_kv
from tests.fakes.sequences import answer, sequence, sequence_of
from tests.infire.scheduling import Rig, shape


def test_the_youngest_gives_way_and_goes_to_the_head_of_the_queue() -> None:
    rig = Rig(6, max_running=2)
    for name in ("old", "young"):
        rig.scheduler.add(sequence(name, prompt=8, max_tokens=12))
    rig.scheduler.add(sequence("next", prompt=2, max_tokens=1))
    ids: dict[str, list[int]] = {}
    while not rig.scheduler.gauges().preemptions:
        for step in rig.step():
            ids.setdefault(step.request_id, []).extend(step.ids)
    assert [entry.seq.request_id for entry in rig.scheduler._tenants.waiting] == ["young", "next"]
    rest = rig.run_out()
    assert ids["young"] + rest["young"] == answer(8, 12)  # nothing is said twice
    assert rig.scheduler.gauges().prompt_tokens_computed == 8 + 8 + 8 + 2
    assert rig.num_free == 6


def test_low_priority_gives_way_before_young() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("low", prompt=8, max_tokens=14, priority=-1))
    rig.scheduler.add(sequence("old", prompt=8, max_tokens=14))
    rig.scheduler.add(sequence("young", prompt=8, max_tokens=14))
    while not rig.scheduler.gauges().preemptions:
        rig.step()
    assert rig.scheduler._entries["low"].seq.num_preempted == 1
    rig.run_out()
    assert rig.num_free == 8


def test_nobody_gives_way_for_blocks_that_the_newcomer_would_only_share() -> None:
    """Two of the three blocks of "low" are the newcomer's beginning: they are not room, too."""
    rig = Rig(8, prefix_cache=True)
    rig.scheduler.add(sequence_of("high", [*range(100, 113)], 3, priority=1))  # four blocks
    rig.scheduler.add(sequence("low", prompt=9, max_tokens=3))
    rig.step()
    rig.scheduler.add(sequence("new", prompt=20, max_tokens=1, priority=1))  # five, and one is free
    said = rig.run_out()
    assert said["new"] == answer(20, 1)
    assert rig.scheduler.gauges().preemptions == 0


def test_of_equals_the_least_preempted_gives_way() -> None:
    rig = Rig(12)
    for name in ("old", "middle", "young"):
        rig.scheduler.add(sequence(name, prompt=10, max_tokens=26))
    young = rig.scheduler._entries["young"].seq
    young.num_preempted = 1
    while not rig.scheduler.gauges().preemptions:
        rig.step()
    assert rig.scheduler._entries["middle"].seq.num_preempted == 1
    assert young.num_preempted == 1


def test_a_row_already_planned_leaves_the_plan_when_it_gives_way() -> None:
    """Rows one behind are planned first, but a prompt of higher priority needs the block."""
    rig = Rig(8, max_step_tokens=2)
    rig.scheduler.add(sequence("decodes", prompt=4, max_tokens=20))
    rig.step()
    rig.step()
    rig.scheduler.add(sequence("urgent", prompt=16, max_tokens=1, priority=1))
    plan = rig.plan()
    while len(plan.rows) == 2:
        rig.finish(plan)
        plan = rig.plan()
    assert [(row.slot, row.start) for row in plan.rows] == [(1, 12)]
    assert plan.closes == (0,)
    assert rig.scheduler.gauges().waiting == 1
    rig.finish(plan)
    assert rig.run_out()["urgent"] == answer(16, 1)
    assert rig.num_free == 8


def test_who_gave_way_computes_nothing_in_the_same_step(tmp_path: Path) -> None:
    """Two prompts are behind; the first takes the second's only block, and tokens are left over."""
    rig = Rig(8, max_step_tokens=4)
    rig.scheduler.add(sequence("first", prompt=14, priority=1), num_adopted=4)
    rig.scheduler.add(sequence("second", prompt=16), num_adopted=4)
    rig.scheduler.add(sequence("held", prompt=16, max_tokens=1, hold=True), num_adopted=15)
    for adoption in rig.scheduler.place():
        path = tmp_path / adoption.request_id
        path.write_bytes(exported_kv(rig.layout, range(adoption.num_tokens)))
        rig.runner.adopt(adoption.block_ids, adoption.num_tokens, str(path))
    starts = [[row.start for row in plan.rows] for plan in rig.plans(4)]
    assert starts == [[15, 4], [7], [11], [12]]
    assert rig.scheduler.gauges().preemptions == 1
    rig.drop("held")
    assert rig.run_out() == {"first": answer(14, 4)[1:], "second": answer(16, 4)}


def test_a_newcomer_must_leave_room_to_those_who_run() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("a", prompt=4, max_tokens=20))
    rig.step()
    rig.scheduler.add(sequence("b", prompt=24, max_tokens=1))  # 6 blocks: none left for `a`
    assert shape(rig.plan()) == [(0, 1)]
    rig.drop("a")


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    rig = Rig(8)
    rig.scheduler.add(sequence("held", prompt=12, max_tokens=1, hold=True))
    rig.step()
    rig.scheduler.add(sequence("big", prompt=24, max_tokens=1))
    rig.scheduler.add(sequence("small", prompt=2, max_tokens=1))
    assert not rig.plan()
    rig.drop("held")
    assert rig.step()[0].request_id == "big"


def running(rig: Rig) -> list[str]:
    return [entry.seq.request_id for entry in rig.scheduler._tenants.running]


def num_preempted(rig: Rig, request_id: str) -> int:
    return rig.scheduler._entries[request_id].seq.num_preempted


def test_a_higher_priority_takes_the_slot_of_a_lower_one() -> None:
    rig = Rig(64, max_running=2)
    for name, priority in (("low", -1), ("even", 1)):
        rig.scheduler.add(sequence(name, prompt=4, max_tokens=9, priority=priority))
    rig.step()
    rig.scheduler.add(sequence("urgent", prompt=4, max_tokens=9, priority=1))
    rig.step()
    assert running(rig) == ["even", "urgent"]
    assert num_preempted(rig, "low") == 1
    rig.scheduler.add(sequence("patient", prompt=4, max_tokens=9, priority=1))
    rig.step()
    assert running(rig) == ["even", "urgent"]  # nobody gives way to an equal
    assert {name: len(ids) for name, ids in rig.run_out().items()} == {
        "low": 8,
        "even": 6,
        "urgent": 7,
        "patient": 9,
    }


def test_as_few_as_possible_give_way() -> None:
    """Of 16 blocks 4 are free; 6 are needed, with one more for each that stays."""
    rig = Rig(16)
    for name, prompt in (("a", 12), ("b", 12), ("c", 14)):
        rig.scheduler.add(sequence(name, prompt=prompt, max_tokens=9))
    rig.plans(2)
    assert rig.num_free == 16 - 4 - 4 - 4
    rig.scheduler.add(sequence("urgent", prompt=24, max_tokens=1, priority=1))
    assert shape(rig.plan()) == [(0, 1), (1, 1), (2, 24)]
    assert running(rig) == ["urgent", "a", "b"]


def test_nobody_gives_way_where_it_would_not_help() -> None:
    rig = Rig(16)
    rig.scheduler.add(sequence("held", prompt=24, max_tokens=1, hold=True))
    rig.step()
    rig.scheduler.add(sequence("low", prompt=12, max_tokens=9, priority=-1))
    rig.step()
    rig.scheduler.add(sequence("urgent", prompt=44, max_tokens=1))
    rig.step()
    assert running(rig) == ["low"]
    assert rig.scheduler.gauges().preemptions == 0
    rig.drop("held")
    rig.drop("urgent")


def test_an_adoption_of_higher_priority_makes_way_too(tmp_path: Path) -> None:
    rig = Rig(4)
    rig.scheduler.add(sequence("low", prompt=10, max_tokens=4, priority=-1))
    rig.step()
    rig.scheduler.add(sequence("urgent", prompt=10, max_tokens=4), num_adopted=9)
    (adoption,) = rig.scheduler.place()
    path = tmp_path / "kv"
    path.write_bytes(exported_kv(rig.layout, range(9)))
    rig.runner.adopt(adoption.block_ids, 9, str(path))
    assert num_preempted(rig, "low") == 1
    assert rig.run_out() == {"low": answer(10, 4)[1:], "urgent": answer(10, 4)}


def test_an_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    rig = Rig(64, max_step_tokens=8)
    rig.scheduler.add(sequence("long", prompt=40, max_tokens=1))
    assert shape(rig.plans(1)[0]) == [(0, 8)]
    rig.scheduler.add(sequence("equal", prompt=5, max_tokens=1))
    rig.scheduler.add(sequence("urgent", prompt=5, max_tokens=1, priority=1))
    assert [shape(plan) for plan in rig.plans(2)] == [[(1, 5), (0, 3)], [(0, 8)]]


def test_who_gave_way_often_enough_never_does_again() -> None:
    rig = Rig(64, max_running=1)
    rig.scheduler.add(sequence("low", prompt=4, max_tokens=9, priority=-1))
    for n in range(MAX_PREEMPTIONS):
        rig.step()
        rig.scheduler.add(sequence(f"urgent {n}", prompt=4, max_tokens=1))
        rig.step()
        assert num_preempted(rig, "low") == n + 1
    rig.scheduler.add(sequence("too late", prompt=4, max_tokens=1, priority=9))
    gained = [step.request_id for _ in range(7) for step in rig.step()]
    assert gained == ["low"] * 6 + ["too late"]


def test_the_favoured_run_together_only_if_all_can_grow_to_their_ends() -> None:
    """Two may become 10 blocks together, and there are 9; a third is as good as any other."""
    rig = Rig(9)
    for name, prompt in (("a", 4), ("b", 4), ("c", 2)):
        rig.scheduler.add(sequence(name, prompt=prompt, max_tokens=16))
    for name in "ab":
        entry = rig.scheduler._entries[name]
        rig.scheduler._tenants.stop(entry)
        entry.favour()
        rig.scheduler._tenants.waiting.append(entry)
        rig.scheduler._tenants.waiting.sort(key=lambda entry: entry.order)
    rig.step()
    assert running(rig) == ["a"]  # and "c" does not overtake "b"
    assert rig.run_out() == {"a": answer(4, 16)[1:], "b": answer(4, 16), "c": answer(2, 16)}
    assert rig.scheduler.gauges().preemptions <= 1


def test_low_priority_has_its_turn_among_any_number_of_urgent_ones() -> None:
    rig = Rig(64, max_running=1)
    rig.scheduler.add(sequence("urgent", prompt=2, max_tokens=1, priority=1))
    rig.scheduler.add(sequence("low", prompt=2, max_tokens=1))
    done: list[str] = []
    while "low" not in done:
        rig.scheduler.add(sequence(f"urgent {len(done)}", prompt=2, max_tokens=1, priority=1))
        done += [step.request_id for step in rig.step()]
    assert len(done) == MAX_OVERTAKEN + 1
