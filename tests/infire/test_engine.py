from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from infire import engine
from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.notes import Adopted, Answer, Drop, Exported, Refused, Submit
from infire.request import Step
from infire.scheduler import Scheduler
from routing.errors import Code
from tests.fakes.runner import CountingRunner, counting_layout, exported_kv
from tests.fakes.sequences import answer, sequence

LAYOUT = counting_layout(block_tokens=4, windows=(None, 6))


class Rig:
    """An engine with the counting model, and what it has said."""

    def __init__(
        self,
        num_blocks: int = 16,
        *,
        max_step_tokens: int = 32,
        windows: Sequence[int | None] = (None, 6),
    ) -> None:
        self.layout = counting_layout(block_tokens=4, windows=windows)
        self.scheduler = Scheduler(
            [BlockPool(num_blocks) for _ in windows],
            self.layout.groups,
            Limits(max_step_tokens=max_step_tokens, max_running=8, vocab_size=256),
        )
        self.runner = CountingRunner(self.layout, [num_blocks] * len(windows))
        ticks = count()
        self.engine = Engine(self.scheduler, self.runner, clock=lambda: next(ticks))
        self.steps: list[Step] = []
        self.answers: list[Answer] = []

    def run_out(self) -> None:
        while results := self.engine.step():
            self.scheduler.check()
            self.steps += results.steps
            self.answers += results.answers

    def ids(self, request_id: str) -> list[int]:
        return [i for step in self.steps if step.request_id == request_id for i in step.ids]

    def num_free(self) -> int:
        return self.engine.gauges().free_blocks


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.scheduler.check()


@pytest.fixture
def kv_path(tmp_path: Path) -> Path:
    """The KV of the prompt 0 .. 9, as another engine would have exported it."""
    path = tmp_path / "kv"
    path.write_bytes(exported_kv(LAYOUT, range(10)))
    return path


def test_nothing_to_do_is_no_step(rig: Rig) -> None:
    assert rig.engine.step() is None
    rig.engine.do(Submit(sequence("a", prompt=3, max_tokens=2)))
    rig.run_out()
    assert rig.ids("a") == answer(3, 2)
    assert rig.engine.step() is None


def test_gauges_count_what_was_done(rig: Rig) -> None:
    rig.engine.submit(sequence("a", prompt=5, max_tokens=3))
    rig.engine.submit(sequence("b", prompt=40, max_tokens=9))
    results = rig.engine.step()
    assert results is not None
    gauges = results.gauges
    assert (gauges.step, gauges.running, gauges.waiting) == (1, 2, 0)
    assert (gauges.prompt_tokens_computed, gauges.output_tokens) == (32, 1)
    # `a` has 5 tokens: 2 blocks in each group. `b` has 27: 7 blocks, and 2 inside the window.
    assert (gauges.free_blocks, gauges.total_blocks) == (32 - 2 - 2 - 7 - 2, 32)
    assert gauges.step_s == 1.0
    rig.engine.drop("b")
    rig.run_out()
    assert rig.engine.gauges().output_tokens == 3
    assert rig.num_free() == 32


def test_a_prompt_computed_here_is_answered_there(rig: Rig, tmp_path: Path) -> None:
    """Prefill, hold, export, adopt, decode: the second engine computes no token of the prompt."""
    path = tmp_path / "kv"
    held = sequence("a", prompt=25, max_tokens=1, hold=True)
    rig.engine.do(Submit(held, export_path=str(path)))
    rig.run_out()
    assert rig.answers == [Exported("a", path.stat().st_size, 25)]
    assert path.read_bytes() == exported_kv(LAYOUT, range(25))
    assert rig.engine.gauges().held == 1

    there = Rig()
    there.engine.do(Submit(sequence("a", prompt=25, generated=1, max_tokens=9), str(path), 25))
    there.run_out()
    rig.engine.do(Drop("a"))
    assert rig.num_free() == 32
    assert there.answers == [Adopted("a")]
    assert rig.ids("a") + there.ids("a") == answer(25, 9)
    assert there.runner.prompt_tokens == there.engine.gauges().prompt_tokens_computed == 0
    assert there.num_free() == 32


def test_adoption_waits_for_blocks(rig: Rig, kv_path: Path) -> None:
    rig.engine.submit(sequence("held", prompt=56, max_tokens=1, hold=True))
    rig.run_out()
    rig.engine.submit(sequence("a", prompt=10, generated=1, max_tokens=3), str(kv_path), 10)
    rig.run_out()
    assert rig.answers == []
    rig.engine.drop("held")
    rig.run_out()
    assert rig.answers == [Adopted("a")]
    assert rig.ids("a") == [11, 12]


def test_an_adoption_dropped_while_it_waits_reads_no_file(rig: Rig) -> None:
    rig.engine.submit(sequence("held", prompt=56, max_tokens=1, hold=True))
    rig.run_out()
    rig.engine.submit(sequence("a", prompt=10, generated=1), "/nonexistent", 10)
    rig.engine.drop("a")
    rig.engine.drop("held")
    rig.run_out()
    assert rig.answers == []


def test_a_file_of_another_size_refuses_that_request_only(rig: Rig, kv_path: Path) -> None:
    kv_path.write_bytes(kv_path.read_bytes()[:-1])
    rig.engine.submit(sequence("a", prompt=10, generated=1, max_tokens=3), str(kv_path), 10)
    rig.engine.submit(sequence("b", prompt=3, max_tokens=3))
    rig.run_out()
    (refused,) = rig.answers
    assert isinstance(refused, Refused)
    assert (refused.request_id, Code(refused.code)) == ("a", Code.INCOMPATIBLE)
    assert "for 10 tokens" in refused.detail
    assert rig.ids("a") == []
    assert rig.ids("b") == answer(3, 3)
    assert rig.num_free() == 32


def test_a_missing_file_refuses_that_request_only(rig: Rig, tmp_path: Path) -> None:
    rig.engine.submit(sequence("a", prompt=9, generated=1), str(tmp_path / "gone"), 9)
    rig.run_out()
    (refused,) = rig.answers
    assert isinstance(refused, Refused)
    assert Code(refused.code) is Code.LOST
    assert rig.num_free() == 32


def test_what_cannot_run_is_refused_and_its_name_is_free(rig: Rig) -> None:
    rig.engine.submit(sequence("a", prompt=60, max_tokens=60))
    rig.engine.submit(sequence("a"), "/nonexistent", 0)
    rig.engine.submit(sequence("a"), None, 2)
    rig.engine.submit(sequence("a", prompt=3, max_tokens=1))
    rig.run_out()
    assert [Code(refused.code) for refused in rig.answers] == [Code.BAD_INPUT] * 3
    assert rig.ids("a") == [3]


def test_a_refused_namesake_leaves_the_running_one_alone(rig: Rig, kv_path: Path) -> None:
    rig.engine.submit(sequence("a", prompt=10, generated=1, max_tokens=3), str(kv_path), 10)
    rig.engine.submit(sequence("a", prompt=10, generated=1, max_tokens=3), "/nonexistent", 10)
    rig.run_out()
    assert sorted(type(answer_).__name__ for answer_ in rig.answers) == ["Adopted", "Refused"]
    assert rig.ids("a") == [11, 12]


def test_kv_is_written_after_what_it_sampled_is_said(rig: Rig, tmp_path: Path) -> None:
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "kv"))
    first = rig.engine.step()
    assert first is not None
    assert first.steps[0].finish == "length"
    assert first.answers == ()
    then = rig.engine.step()
    assert then is not None
    assert then.answers == (Exported("a", (tmp_path / "kv").stat().st_size, 9),)


def test_a_long_prompt_is_written_in_parts_as_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 10)
    rig = Rig(32, windows=(None,))  # 32 tokens a step
    path = tmp_path / "kv"
    held = sequence("a", prompt=50, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(path))
    rig.engine.submit(sequence("b", prompt=40, max_tokens=2))
    rig.run_out()
    assert rig.answers == [Exported("a", 32 * 8, 32), Exported("a", 50 * 8, 50)]
    parts = exported_kv(rig.layout, range(32)), exported_kv(rig.layout, range(50))
    assert path.read_bytes() == parts[0] + b"".join(
        plane[32 * 4 :] for plane in (parts[1][:200], parts[1][200:])
    )

    there = Rig(32, windows=(None,))
    resumed = sequence("a", prompt=50, generated=1, max_tokens=9)
    there.engine.do(Submit(resumed, str(path), 50, piece_ends=(32, 50)))
    there.run_out()
    assert rig.ids("a") + there.ids("a") == answer(50, 9)
    for ends in ((32, 49), (50, 50), (0, 50), (40, 30, 50), (32,)):
        wrong = sequence("b", prompt=50, generated=1, max_tokens=9)
        there.engine.do(Submit(wrong, str(path), 50, piece_ends=ends))
        there.run_out()
        refused = there.answers.pop()
        assert isinstance(refused, Refused)
        assert Code(refused.code) is Code.INCOMPATIBLE


def test_kv_with_windows_is_written_in_one(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 10)
    held = sequence("a", prompt=50, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "kv"))
    rig.run_out()
    [exported] = rig.answers
    assert isinstance(exported, Exported)
    assert exported.num_tokens == 50


def test_a_dropped_request_is_not_written(rig: Rig, tmp_path: Path) -> None:
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "kv"))
    rig.engine.step()
    rig.engine.drop("a")
    rig.run_out()
    assert rig.answers == []
    assert list(tmp_path.iterdir()) == []


def test_a_dropped_request_takes_its_export_with_it(rig: Rig, tmp_path: Path) -> None:
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "kv"))
    rig.run_out()
    assert (tmp_path / "kv").exists()
    rig.engine.drop("a")
    assert list(tmp_path.iterdir()) == []


def test_a_drop_leaves_a_file_that_was_there_before(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("mine")
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "kv"))
    rig.run_out()
    rig.engine.drop("a")
    assert (tmp_path / "kv").read_text() == "mine"


def test_an_export_that_cannot_be_written_ends_the_hold(rig: Rig, tmp_path: Path) -> None:
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(held, export_path=str(tmp_path / "no such folder" / "kv"))
    rig.run_out()
    (refused,) = rig.answers
    assert isinstance(refused, Refused)
    assert Code(refused.code) is Code.LOST
    assert rig.num_free() == 32


def test_of_a_request_that_ends_without_its_answer_nothing_is_kept(
    rig: Rig, tmp_path: Path
) -> None:
    kv_path = str(tmp_path / "no such file")
    adopts = sequence("adopts", prompt=9, max_tokens=1, hold=True)
    rig.engine.submit(adopts, kv_path, 5, export_path=str(tmp_path / "a"))
    robbed = sequence("robbed", prompt=9, max_tokens=5, hold=True)
    rig.engine.submit(robbed, export_path=str(tmp_path / "b"))
    rig.engine.step()  # which answers that there is no file
    rig.runner.tags.carried[0][rig.scheduler._entries["robbed"].seq.block_ids[0][0]] += 1
    rig.run_out()
    assert [answer.request_id for answer in rig.answers if isinstance(answer, Refused)] == [
        "robbed"
    ]
    assert rig.engine._exports == {}
    assert rig.num_free() == 32


def test_logprobs_come_along_where_asked(rig: Rig) -> None:
    rig.engine.submit(sequence("a", prompt=3, max_tokens=1, logprobs=2))
    rig.engine.submit(sequence("b", prompt=3, max_tokens=1))
    rig.run_out()
    by_id = {step.request_id: step.logprobs for step in rig.steps}
    assert [(p.token_id, p.logprob, p.top) for p in by_id["a"]] == [(3, 0.0, ((3, 0.0), (4, -1.0)))]
    assert by_id["b"] == ()


def test_two_engines_share_nothing() -> None:
    one, other = Rig(), Rig()
    one.engine.submit(sequence("a", prompt=20, max_tokens=2))
    other.engine.submit(sequence("a", prompt=5, max_tokens=2))
    one.run_out()
    other.run_out()
    assert (one.ids("a"), other.ids("a")) == (answer(20, 2), answer(5, 2))
