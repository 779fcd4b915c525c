"""The child that compiles grammars first: what it says, and that nothing but itself ends by one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infire import grammar_check
from infire.grammar_check import CannotCheck, Checker
from infire.request import Grammar
from tests.fakes.model_folder import make_counting_folder
from tests.infire.grammars import BYTES_SIZE

GOOD = Grammar("regex", "a+")
BAD = Grammar("regex", "[")
# A child whose check of one expression does what no grammar is known to do; all else is real.
_CHILD = """
import sys, infire.grammar_check as check
real = check.fault_of
def fault_of(grammar, vocabulary):
    if grammar.source == "spin":
        while True: pass
    if grammar.source == "fill":
        kept = [bytearray(b"x" * (16 << 20)) for _ in range(64)]
    if grammar.source == "crash":
        import os; os.abort()
    if grammar.source == "sleep":
        import time; time.sleep(1000)
    return real(grammar, vocabulary)
check.fault_of, check.CPU_S = fault_of, 0.3
check.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_counting_folder(tmp_path_factory.mktemp("counting"))


@pytest.fixture
def checker(folder: Path) -> Iterator[Checker]:
    made = Checker(folder, BYTES_SIZE, wall_s=5.0)
    yield made
    made.close()
    assert not psutil.Process().children()


def pid_of(checker: Checker) -> int:
    assert checker._child is not None
    return checker._child.pid


def test_one_child_answers_one_after_the_other(checker: Checker) -> None:
    assert not psutil.Process().children()  # none before one is needed
    assert checker.check(GOOD) == ""
    first = pid_of(checker)
    assert "unclosed character class" in checker.check(BAD)
    assert checker.check(Grammar("choice", '["é"]')) == ""
    assert pid_of(checker) == first


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("spin", "it takes more than 2 s to compile"),
        ("fill", "it takes more than 256 MiB to compile"),
        ("crash", "it takes more than 256 MiB to compile"),
        ("sleep", "it takes more than 1 s to compile"),
    ],
)
def test_what_takes_too_much_ends_the_child_and_nothing_else(
    folder: Path, source: str, why: str
) -> None:
    checker = Checker(folder, BYTES_SIZE, wall_s=1.0 if source == "sleep" else 20.0)
    checker._words = [sys.executable, "-c", _CHILD, str(folder), str(BYTES_SIZE)]
    try:
        assert checker.check(GOOD) == ""
        first = pid_of(checker)
        assert checker.check(Grammar("regex", source)) == why
        assert not psutil.pid_exists(first)
        assert checker.check(GOOD) == ""
    finally:
        checker.close()


def test_a_child_that_was_killed_is_replaced(checker: Checker) -> None:
    assert checker.check(GOOD) == ""
    psutil.Process(pid_of(checker)).kill()
    psutil.Process(pid_of(checker)).wait()
    assert checker.check(GOOD) == ""
    assert "unclosed character class" in checker.check(BAD)


def test_without_a_vocabulary_there_is_no_child(tmp_path: Path) -> None:
    checker = Checker(tmp_path, BYTES_SIZE)
    with pytest.raises(CannotCheck, match="ended with 1"):
        checker.check(GOOD)


def test_the_child_has_its_limits(checker: Checker) -> None:
    """Of memory; and it goes when whoever asks is gone."""
    checker.check(GOOD)
    child = psutil.Process(pid_of(checker))
    limit, _ = child.rlimit(psutil.RLIMIT_AS)
    assert 0 < limit - child.memory_info().vms <= grammar_check.MOST_BYTES
    assert checker._child is not None
    assert checker._child.stdin is not None
    checker._child.stdin.close()
    assert child.wait(10) == 0
