"""KV behind the device: in host memory, in files; what is found there is as if computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from infire.engine import Engine
from infire.notes import Results
from infire.prefix import KEY_BYTES
from infire.request import Sequence
from infire.tier_files import TierFiles, make_tiers
from infire.tiers import Tiers
from tests.fakes.counting_engine import counting_engine
from tests.fakes.runner import counting_layout
from tests.fakes.sequences import answer, sequence

BLOCK = 16 * 8  # bytes of a block of the counting model
BOUND = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def block(number: int) -> bytes:
    return bytes([number]) * BLOCK


def files(folder: Path, most: int = BOUND, layout: str = "layout") -> TierFiles:
    return TierFiles(folder, layout, block_bytes=BLOCK, most_bytes=most)


def test_the_longest_unused_leaves_host_memory_first() -> None:
    tiers = Tiers(3 * BLOCK, BLOCK)
    for n in range(3):
        tiers.put(key(n), block(n))
    assert tiers.get(key(0)) == block(0)
    tiers.put(key(3), block(3))
    assert [n for n in range(4) if tiers.has(key(n))] == [0, 2, 3]
    came, went = tiers.take_news()
    assert {*came} == {key(0), key(2), key(3)}
    assert went == [key(1)]


def test_what_leaves_memory_is_in_files_and_outlives_the_process(tmp_path: Path) -> None:
    behind = files(tmp_path)
    tiers = Tiers(2 * BLOCK, BLOCK, behind)
    for n in range(5):
        tiers.put(key(n), block(n))
    behind.wait_written()
    assert all(tiers.get(key(n)) == block(n) for n in range(5))
    assert tiers.num_found == {"host": 0, "disk": 5}
    behind.close(5.0)
    again = Tiers(0, BLOCK, files(tmp_path))
    assert again.take_news()[0] == [key(n) for n in range(5)]
    assert again.get(key(3)) == block(3)
    assert not again.has(key(9))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: b"X" + data[1:],
        lambda data: data[:8] + key(7) + data[8 + KEY_BYTES :],
    ],
    ids=["cut short", "too long", "empty", "a bit flipped", "another format", "of another key"],
)
def test_a_file_that_is_not_whole_is_no_block_and_goes(tmp_path: Path, spoil) -> None:
    made = files(tmp_path)
    made.put(key(1), block(1))
    made.put(key(2), block(2))
    made.wait_written()
    path = tmp_path / "layout" / key(1).hex()
    path.write_bytes(spoil(path.read_bytes()))
    assert made.get(key(1)) is None
    assert not path.exists()
    assert not made.has(key(1))
    assert made.get(key(2)) == block(2)
    assert made.take_news() == ([key(1), key(2)], [key(1)])


def test_other_files_are_removed_and_those_of_another_layout_are_not_looked_at(
    tmp_path: Path,
) -> None:
    first = files(tmp_path)
    first.put(key(1), block(1))
    first.wait_written()
    (tmp_path / "layout" / ".half-written").write_bytes(b"k")
    (tmp_path / "layout" / "notes.txt").write_text("hello")
    assert files(tmp_path, layout="other").num_blocks == 0
    assert files(tmp_path).num_blocks == 1
    assert [path.name for path in (tmp_path / "layout").iterdir()] == [key(1).hex()]


def test_the_bound_counts_what_an_earlier_process_left(tmp_path: Path) -> None:
    size = BLOCK + 36
    first = files(tmp_path, 10 * size)
    for n in range(10):
        first.put(key(n), block(n))
    first.wait_written()
    second = files(tmp_path, 4 * size)
    assert second.num_blocks == 4
    second.put(key(20), block(20))
    second.wait_written()
    assert second.num_blocks == len(list((tmp_path / "layout").iterdir())) == 4
    assert second.get(key(20)) == block(20)


def test_two_engines_in_one_folder_do_each_other_no_harm(tmp_path: Path) -> None:
    one, two = files(tmp_path), files(tmp_path)
    for n in range(20):
        for it in (one, two):
            it.put(key(n), block(n))
    one.wait_written()
    two.wait_written()
    (tmp_path / "layout" / key(3).hex()).unlink()  # as the other's bound would
    assert one.get(key(3)) is None
    assert all(it.get(key(n)) == block(n) for it in (one, two) for n in range(4, 20))


def test_an_engine_that_begins_beside_another_ends_no_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes for half-written, and removes, what the other is about to rename."""
    one, others = files(tmp_path), []
    rename = Path.rename

    def begin_and_rename(path: Path, target: Path) -> Path:
        if not others:
            others.append(files(tmp_path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", begin_and_rename)
    for n in range(2):
        one.put(key(n), block(n))
    one.wait_written()
    assert others
    assert [one.get(key(n)) for n in range(2)] == [None, block(1)]


def test_a_file_that_goes_while_an_engine_begins_is_no_block(tmp_path: Path) -> None:
    (tmp_path / "layout").mkdir()
    gone = tmp_path / "layout" / key(1).hex()
    gone.symlink_to("nowhere")  # listed, and not there
    made = files(tmp_path)
    made.put(key(2), block(2))
    made.wait_written()
    assert made.get(key(2)) == block(2)
    assert not made.has(key(1))


def test_a_block_written_at_once_is_written_again_when_it_went(tmp_path: Path) -> None:
    made = files(tmp_path)
    put_nowait = made._unwritten.put_nowait

    def put_and_wait(item: tuple[bytes, bytes]) -> None:
        put_nowait(item)
        made.wait_written()

    made._unwritten.put_nowait = put_and_wait  # type: ignore[method-assign]
    made.put(key(1), block(1))
    (tmp_path / "layout" / key(1).hex()).unlink()  # as another engine's bound would
    assert made.get(key(1)) is None
    made.put(key(1), block(1))
    assert made.get(key(1)) == block(1)


def test_ranks_of_one_folder_have_blocks_of_their_own(tmp_path: Path) -> None:
    """As the same tokens have the same key on each, and other heads."""
    model = counting_layout(block_tokens=16, num_heads=2)
    found = []
    for tp_rank, tp_size in ((0, 2), (1, 2), (0, 1), (0, 2)):
        layout = model.cut(tp_size, tp_rank)
        made = make_tiers(layout, host_bytes=0, folder=tmp_path, disk_bytes=BOUND)
        assert made is not None
        found.append(made.get(key(1)))
        made.put(key(1), bytes([tp_rank]) * layout.block_bytes)
        made.close(5.0)
    assert found == [None, None, None, bytes(BLOCK)]


def test_a_folder_that_cannot_be_written_is_no_tier_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    made = files(tmp_path / "file")
    tiers = Tiers(BLOCK, BLOCK, made)
    for n in range(3):
        tiers.put(key(n), block(n))
    made.wait_written()
    assert tiers.get(key(2)) == block(2)
    assert tiers.get(key(0)) is None
    assert tiers.is_kept(key(0))  # there is no use in trying
    assert len([it for it in caplog.records if "KV files" in it.message]) == 1


# --- in an engine --------------------------------------------------------------------------------


def run_out(engine: Engine, *sequences: Sequence) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for it in sequences:
        engine.submit(it)
    while results := engine.step():
        for step in results.steps:
            ids.setdefault(step.request_id, []).extend(step.ids)
    return ids


def small_engine(folder: Path | None, *, host_blocks: int = 0, num_blocks: int = 8) -> Engine:
    _, engine = counting_engine(
        kv_tokens=16 * num_blocks,
        host_cache_bytes=host_blocks * BLOCK,
        disk_cache_dir=folder,
    )
    return engine


def test_a_prompt_that_was_evicted_is_not_computed_again() -> None:
    engine = small_engine(None, host_blocks=20)
    for n, prompt in enumerate((100, 110, 100)):  # 7 blocks each, of 8
        start = sequence(f"r{n}", prompt, 4)
        assert run_out(engine, start)[f"r{n}"] == answer(prompt, 4)
    gauges = engine.gauges()
    assert gauges.prompt_tokens_computed == 100 + (110 - 96) + (100 - 96)
    # The second begins as the first, and both have all of it where it is; then some was evicted.
    assert gauges.prompt_tokens_cached == 2 * 96


def test_what_was_idle_on_the_device_is_found_after_a_restart(tmp_path: Path) -> None:
    engine = small_engine(tmp_path)
    assert run_out(engine, sequence("a", 100, 4))["a"] == answer(100, 4)
    while engine.rest():
        engine._tiers._files.wait_written()  # type: ignore[union-attr]
    again = small_engine(tmp_path)
    first = again.step()
    assert first is None
    assert run_out(again, sequence("a", 100, 4))["a"] == answer(100, 4)
    gauges = again.gauges()
    assert (gauges.prompt_tokens_cached, gauges.prompt_tokens_computed) == (96, 4)
    assert gauges.disk_blocks_found == 6


def test_what_is_read_again_beside_a_block_that_never_left_is_all_read(tmp_path: Path) -> None:
    """Of three blocks the device has lost the second, and the tier has all."""
    engine = small_engine(tmp_path, num_blocks=12)
    engine.submit(sequence("short", 40, 1))  # names the first two
    engine.submit(sequence("long", 40, 20))  # computed the same beside it, and names the third
    engine.step()
    other = sequence("other", 128, 1)
    other.cache_salt = b"other"
    run_out(engine, other)  # which takes what was free, and the second of "short"
    while engine.rest():
        engine._tiers._files.wait_written()  # type: ignore[union-attr]
    assert run_out(engine, sequence("again", 60, 4))["again"] == answer(60, 4)
    assert engine.gauges().prompt_tokens_cached == 48


def test_another_tenant_finds_nothing(tmp_path: Path) -> None:
    engine = small_engine(tmp_path, host_blocks=20)
    for n, salt in enumerate((b"one", b"two", b"one")):
        asked = sequence(f"r{n}", 100, 4)
        asked.cache_salt = salt
        run_out(engine, asked)
    assert engine.gauges().prompt_tokens_cached == 96


class Heard:
    """What an engine has said: ids, and the keys it has somewhere."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.known: set[bytes] = set()

    def hear(self, results: Results | None) -> bool:
        if results is None:
            return False
        for step in results.steps:
            self.ids.setdefault(step.request_id, []).extend(step.ids)
        self.known = (self.known | {*results.cached}) - {*results.uncached}
        return True


def settle(engine: Engine, rng: random.Random) -> None:
    """Now and then, have all files written: a thread does it, and a disk may take its time."""
    if engine._tiers is not None and engine._tiers._files is not None and rng.random() < 0.2:
        engine._tiers._files.wait_written()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_evicted_and_found_again_answers_are_right(seed: int, tmp_path: Path) -> None:
    """The counting runner checks that every block holds what its row must find there."""
    rng = random.Random(seed)
    engine = small_engine(
        tmp_path if seed % 2 else None, host_blocks=rng.randrange(12), num_blocks=12
    )
    expected: dict[str, list[int]] = {}
    heard = Heard()
    for n in range(150):
        prompt, more = rng.choice((20, 40, 70, 100, 130)), rng.randrange(1, 40)
        asked = sequence(f"r{n}", prompt, more, priority=rng.choice((0, 0, 0, 1, 2)))
        asked.cache_salt = rng.choice((b"a", b"b", b"c"))
        engine.submit(asked)
        expected[f"r{n}"] = answer(prompt, more)
        for _ in range(rng.randrange(12)):
            heard.hear(engine.step())
            engine._scheduler.check()
        if rng.random() < 0.1:
            engine.drop(f"r{n}")
            del expected[f"r{n}"]
        if rng.random() < 0.2:
            engine.rest()
        settle(engine, rng)
    while heard.hear(engine.step()):
        pass
    assert {name: heard.ids[name] for name in expected} == expected
    tiers = engine._tiers
    if tiers is not None and tiers._files is None:
        here = {it for it in heard.known if tiers.has(it) or engine._scheduler.has_cached(it)}
        assert heard.known == here
    if seed % 2:
        assert engine.gauges().disk_blocks_found > 0
