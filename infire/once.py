"""Files that are made once, by whoever comes first, and used by all. Knows no content."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable
from pathlib import Path


def make_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, after `make(temporary)` has written it if it was not there. Raises OSError.

    Whole or not at all, in spite of crashes; of several processes one makes it, the others wait.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however it ends
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:
                made = Path(folder) / path.name
                make(made)
                made.replace(path)
    return path
