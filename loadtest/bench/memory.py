"""How much memory a server takes, with all the processes that it has started. Linux only.

PSS (proportional set size): a page that n processes share counts as 1/n in each of them, so that
the sum over processes counts it once. Pages of mapped files count, as for every peer.
https://www.kernel.org/doc/html/latest/filesystems/proc.html (smaps_rollup)
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")
SAMPLE_S = 0.1


def pss_bytes(pid: int, proc: Path = PROC) -> int:
    """Of the process and its descendants; those that have ended count nothing."""
    return sum(_one_pss_bytes(proc / str(one)) for one in tree(pid, proc))


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """The process and its descendants, as far as they live."""
    children: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        if (parent := _parent(stat)) is not None:
            children.setdefault(parent, []).append(int(stat.parent.name))
    pids = [pid]
    for parent in pids:  # grows while it is walked
        pids += children.get(parent, ())
    return pids


class Peak:
    """The most that was seen. Made by `watch_memory`."""

    def __init__(self) -> None:
        self.pss_bytes = 0


@contextmanager
def watch_memory(pid: int) -> Generator[Peak, None, None]:
    """The peak of the process tree from here to the end of the block, looked at every 0.1 s."""
    peak = Peak()
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            peak.pss_bytes = max(peak.pss_bytes, pss_bytes(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        over.set()
        looking.join()


def _parent(stat: Path) -> int | None:
    """Of a process, by its line: number (name) state parent ...; names may have brackets."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended while it was looked at
        return None


def _one_pss_bytes(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:  # ended, or ending: its memory is gone
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
