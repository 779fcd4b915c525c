from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.origin_gpu.local_workers import LocalWorker, local_worker


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[LocalWorker, None]:
    """One worker of both roles for all tests of a module that leave it as they found it."""
    async with local_worker(tmp_path_factory.mktemp("worker"), "shared") as running:
        yield running
