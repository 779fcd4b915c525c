"""What engines said of themselves while starting, from the logs of their workers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

WHY = b"computing on "  # how an engine begins to say why it computes where it does


class _EngineUp(Struct):
    """The line of a worker's log that says its engine is there."""

    event: str
    device: str
    dtype: str
    threads: int


def engine_lines(logs: Iterable[Path]) -> list[str]:
    """Device, type, threads, and why this device: a line for all engines that say the same."""
    found: dict[str, None] = {}
    for log in logs:
        why = ""
        for line in log.read_bytes().splitlines():
            if line.startswith(WHY):
                why = f" ({line.decode(errors='replace')})"
            elif up := _engine_up(line):
                found[f"{up.device}, {up.dtype}, {up.threads} threads{why}"] = None
    return list(found)


def _engine_up(line: bytes) -> _EngineUp | None:
    try:
        said = msgspec.json.decode(line, type=_EngineUp)
    except msgspec.DecodeError:
        return None  # another event, or a library's own words
    return said if said.event == "engine up" else None
