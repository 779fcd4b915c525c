"""What engines said of themselves while starting, from the logs of their workers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct


class _Line(Struct):
    """A line of a worker's log, or of its engine's, which goes to the same file."""

    event: str = ""
    dtype: str = ""
    threads: int = 0


def engine_lines(logs: Iterable[Path]) -> list[str]:
    """Device and why, type and threads: a line for all engines that say the same."""
    found: dict[str, None] = {}
    for log in logs:
        device = ""
        for encoded in log.read_bytes().splitlines():
            try:
                line = msgspec.json.decode(encoded, type=_Line)
            except msgspec.DecodeError:
                continue  # a library's own words
            if line.event.startswith("device "):
                device = line.event
            elif line.event == "engine up" and device:
                found[f"{device}; {line.dtype}, {line.threads} threads"] = None
    return list(found)
