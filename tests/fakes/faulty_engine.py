"""A counting engine with one fault, for tests of what the rest of a region makes of it.

    faulty_engine.py [--poison ID] [--slow-load-s S] [--load-gate FILE] [--gate FILE] FLAGS

FLAGS are those of counting_engine.py. A step that is given the token ID raises, as a device that is
out of memory does. Loading takes S seconds longer, or until the file of `--load-gate` is there.
Every start adds a line to the file named by `--starts`. With `--gate`, who has opened a file of KV
to adopt, or is about to export one, says so by FILE.reached, and goes on once FILE is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence as Seq
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infire.plan import RowResult, StepPlan
from tests.fakes import counting_engine
from tests.fakes.runner import CountingRunner


class PoisonedRunner(CountingRunner):
    """Counts, until it is given the one id that it cannot take."""

    poison = -1

    def run(self, plan: StepPlan) -> Seq[RowResult]:
        if any(self.poison in opened.token_ids for opened in plan.opens):
            raise MemoryError("out of memory in a step")
        return super().run(plan)


class GatedRunner(PoisonedRunner):
    """Waits where KV comes in and goes out, so that a test can do something at that moment."""

    gate: Path | None = None

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        self._wait()
        return super().export(block_ids, num_tokens, path, start)

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        with Path(path).open("rb") as file:
            self._wait()
            opened = f"/proc/self/fd/{file.fileno()}"  # whatever has become of its name
            super().adopt(block_ids, num_tokens, opened, piece_ends)

    def _wait(self) -> None:
        if self.gate is None:
            return
        self.gate.with_suffix(".reached").touch()
        wait_for(self.gate)


def wait_for(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.005)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--poison", type=int, default=-1)
    flags.add_argument("--slow-load-s", type=float, default=0.0)
    flags.add_argument("--starts", type=Path)
    flags.add_argument("--load-gate", type=Path)
    flags.add_argument("--gate", type=Path)
    mine, rest = flags.parse_known_args()
    if mine.starts:
        with mine.starts.open("a") as file:
            file.write("start\n")
    time.sleep(mine.slow_load_s)
    if mine.load_gate:
        wait_for(mine.load_gate)
    GatedRunner.poison, GatedRunner.gate = mine.poison, mine.gate
    counting_engine.CountingRunner = GatedRunner
    sys.argv[1:] = rest
    counting_engine.main()


if __name__ == "__main__":
    main()
