"""Keys for tests, made and read at a time that is passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge import keys
from edge.auth import Verifier
from routing.errors import Code, Failure

NOW = 1_700_000_000.0
DAY_S = 86_400


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def create(folder: Path, account: str = "acme", **more: Any) -> str:
    return keys.create(folder, account, **{"days": 30, "now": NOW} | more)


def refusal(verifier: Verifier, authorization: str | None, account: str = "acme") -> str:
    """Why a key is not taken; fails when it is."""
    with pytest.raises(Failure) as caught:
        verifier.tenant(authorization, account)
    assert caught.value.code is Code.UNAUTHENTICATED
    return caught.value.detail
