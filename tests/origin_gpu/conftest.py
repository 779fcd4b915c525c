from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

from origin_gpu.kv_files import roots
from origin_gpu.kv_nixl import Nixl, NotInstalled
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_ways import Way
from tests.origin_gpu.local_workers import LocalWorker, local_worker

Ends: TypeAlias = tuple[Sequence[Way], Sequence[Way]]  # of the door, and of the collector
OVER_THE_CONNECTION: Ends = ((), ())
FOLDER = "edgefire-kv-1-0123abcd"  # of a worker's KV, as they are called


@pytest.fixture
def offered(tmp_path: Path) -> Path:
    """A file of KV, in a folder as workers have them."""
    (tmp_path / "giver" / FOLDER).mkdir(parents=True, mode=0o700)
    path = tmp_path / "giver" / FOLDER / "7.kv"
    path.write_bytes(b"k" * 1000)
    return path


def shared(tmp_path: Path) -> SharedFiles:
    return SharedFiles([tmp_path / "nowhere", tmp_path / "giver"])


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[LocalWorker, None]:
    """One worker of both roles for all tests of a module that leave it as they found it."""
    async with local_worker(tmp_path_factory.mktemp("worker"), "shared") as running:
        yield running


@pytest.fixture(scope="module")
def nixl() -> Ends:
    """An agent at each end."""
    os.environ.setdefault("UCX_TLS", "tcp,shm,self")
    try:
        return [Nixl()], [Nixl()]
    except NotInstalled as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=["tcp", "shared", "nixl"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Ends:
    """Every way there is; files may lie in `tmp_path`, or where workers have them."""
    match request.param:
        case "tcp":
            return OVER_THE_CONNECTION
        case "shared":
            places = [tmp_path, *roots()]
            return [SharedFiles(places)], [SharedFiles(places)]
        case _:
            found: Ends = request.getfixturevalue("nixl")
            return found
