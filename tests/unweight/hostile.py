"""What is asked of every file that is not what it says."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unweight.bundles import left_in
from unweight.safetensors_header import BadFile
from unweight.writer import check_folder, unpack_folder


def refused(path: Path, kind: type[BadFile], *words: str) -> None:
    """Unpacking and checking both raise it, of the file, and leave nothing."""
    target = path.parent / "out"
    for attempt in (
        lambda: unpack_folder(path, target / "again.safetensors", threads=2),
        lambda: check_folder(path, threads=1),
    ):
        with pytest.raises(BadFile) as caught:
            attempt()
        assert type(caught.value) is kind, repr(caught.value)
        for word in (path.name, *words):
            assert word in str(caught.value)
    assert left_in(target) == []


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """That no more is asked of memory at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()
