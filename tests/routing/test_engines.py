"""What is told of the engines, from logs as their workers write them."""

from __future__ import annotations

from pathlib import Path

from routing.engines import engine_lines

UP = '{"level":"info","event":"engine up","device":"cpu","dtype":"bfloat16","threads":2}\n'
WHY = "computing on the CPU: no CUDA device is visible\n"
SLOW = "computing with torch, several times slower: none of g++, c++, clang++ is on the PATH\n"


def test_engines_that_say_the_same_are_one_line(tmp_path: Path) -> None:
    logs = [tmp_path / name for name in ("a.log", "b.log", "c.log")]
    logs[0].write_text("Some library warns\n" + WHY + UP + '{"event":"request","id":"x"}\n')
    logs[1].write_text(WHY + UP)
    logs[2].write_text(UP.replace("cpu", "cuda:0"))
    assert engine_lines(logs) == [
        "cpu, bfloat16, 2 threads (computing on the CPU: no CUDA device is visible)",
        "cuda:0, bfloat16, 2 threads",
    ]


def test_kernels_that_are_missing_are_told_too(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(SLOW + WHY + UP)
    [line] = engine_lines([log])
    assert line == f"cpu, bfloat16, 2 threads ({SLOW.strip()}; {WHY.strip()})"


def test_an_engine_that_never_came_up_says_nothing(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(WHY + "Traceback ...\n")
    assert engine_lines([log]) == []
