"""What engines said of themselves while starting, from the logs of their workers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

# How an engine begins to say why it computes where it does, and with what.
WHY = (b"computing on ", b"computing with ")


class _EngineUp(Struct):
    """The line of a worker's log that says its engine is there."""

    event: str
    device: str
    dtype: str
    threads: int


def engine_lines(logs: Iterable[Path]) -> list[str]:
    """Device, type, threads, and why these: a line for all engines that say the same."""
    found: dict[str, None] = {}
    for log in logs:
        why: list[str] = []
        for line in log.read_bytes().splitlines():
            if line.startswith(WHY):
                why.append(line.decode(errors="replace"))
            elif up := _engine_up(line):
                words = f"{up.device}, {up.dtype}, {up.threads} threads"
                found[f"{words} ({'; '.join(why)})" if why else words] = None
    return list(found)


def _engine_up(line: bytes) -> _EngineUp | None:
    try:
        said = msgspec.json.decode(line, type=_EngineUp)
    except msgspec.DecodeError:
        return None  # another event, or a library's own words
    return said if said.event == "engine up" else None
