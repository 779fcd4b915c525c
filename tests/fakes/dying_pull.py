"""Pulls that are killed, each at another instant.

`python -m tests.fakes.dying_pull SOURCE PLACE STEP [OLD_SOURCE]`: an instant is where a line of the
code that pulls is about to run for the first or the last time. For every STEP-th of them, counted
from the end, a process pulls SOURCE into a folder of its own under PLACE and is killed there by
SIGKILL. With OLD_SOURCE the folder held that before. Prints one line of JSON a pull: where it
ended, and its folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import infire.gguf_folder
import infire.gguf_weights
import infire.pull
import infire.sources

Line = tuple[str, int]
CODE = {
    str(module.__file__)
    for module in (infire.pull, infire.sources, infire.gguf_folder, infire.gguf_weights)
}


def pull(source: str, into: Path, at_line: Callable[[Line], None]) -> None:
    """Pull, and tell `at_line` of every line of ours before it runs."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in CODE:
            return None
        if event == "line":
            at_line((Path(name).name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    infire.pull.pull(source, into)
    sys.settrace(None)


def in_child(act: Callable[[], None]) -> int:
    """Run `act` in a copy of this process; what it ended by, as `waitpid` says it."""
    if not (child := os.fork()):
        act()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def lines_of_a_pull(source: str, into: Path) -> list[Line]:
    """Every line that a whole pull runs, as often as it does."""
    reads, writes = os.pipe()

    def record() -> None:
        ran: list[Line] = []
        pull(source, into, ran.append)
        with open(writes, "w") as pipe:
            json.dump(ran, pipe)

    assert in_child(record) == 0
    os.close(writes)
    with open(reads) as pipe:
        return [(name, number) for name, number in json.load(pipe)]


def instants(lines: list[Line]) -> list[int]:
    """Where in `lines` each is met for the first and for the last time, from the end."""
    last = {line: place for place, line in enumerate(lines)}
    first = {line: place for place, line in reversed(list(enumerate(lines)))}
    return sorted({*first.values(), *last.values()}, reverse=True)


def killed_at(instant: int, source: str, into: Path) -> int:
    left = iter(range(instant, -1, -1))

    def die(line: Line) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child(lambda: pull(source, into, die))


def main(source: str, place: str, step: str, old_source: str = "") -> None:
    def folder(name: str) -> Path:
        """A folder to pull into, with nothing of another pull beside it."""
        into = Path(place) / name / "model"
        if old_source:
            assert in_child(lambda: infire.pull.pull(old_source, into)) == 0
        return into

    lines = lines_of_a_pull(source, folder("whole"))
    for instant in instants(lines)[:: int(step)]:
        into = folder(f"killed-{instant}")
        ended = killed_at(instant, source, into)
        assert os.WIFSIGNALED(ended), (lines[instant], ended)
        print(json.dumps({"line": "{}:{}".format(*lines[instant]), "folder": str(into)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
