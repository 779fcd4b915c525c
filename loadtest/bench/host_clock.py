"""CPU time and wake-ups of other processes, and a page on which an engine tells what it has done.

Linux only. Knows no engine and no window: numbers that only ever grow.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct

_WAITED = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)
_PAGE = Struct("=QQQ")  # process id, nanoseconds in the scheduler, output tokens


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of all threads of a process since its start.

    By its POSIX CPU-time clock, to the nanosecond; /proc has hundredths of a second. The clock's
    id is made as clock_getcpuclockid(3) makes it, which Python does not offer for processes.
    """
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def wakeups(pid: int) -> int:
    """How often threads of a process that are there now have waited, and so had to be woken."""
    statuses = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(int(_WAITED.findall(status.read_text())[0]) for status in statuses)


class Tally:
    """What one engine has done since its start, for another process to read at any time."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page

    def tell(self, pid: int, scheduler_ns: int, output_tokens: int) -> None:
        _PAGE.pack_into(self._page, 0, pid, scheduler_ns, output_tokens)

    def read(self) -> tuple[int, int, int]:
        """Process id, nanoseconds of CPU in the scheduler, output tokens; zeros before the first
        step."""
        pid, scheduler_ns, output_tokens = _PAGE.unpack_from(self._page)
        return pid, scheduler_ns, output_tokens


@contextmanager
def shared_tally(path: Path) -> Generator[Tally, None, None]:
    """The tally kept in the file at `path`, which is made where it is missing."""
    with path.open("a+b") as file:
        file.truncate(_PAGE.size)
        with mmap.mmap(file.fileno(), _PAGE.size) as page:
            yield Tally(page)
