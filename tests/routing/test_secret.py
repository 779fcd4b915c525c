"""The fleet's secret: made once, read by its owner only, asked of every internal caller."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from routing.secret import NeedsSecret, authorized, bearer, make_secret, read_secret
from tests.fakes.serving import serving


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "fleet" / "secret"
    made = make_secret(path)
    assert len(made) >= 43  # 256 bits in base64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert make_secret(path) == read_secret(path) == made
    assert make_secret(tmp_path / "another") != made
    assert [it.name for it in path.parent.iterdir()] == ["secret"]


def test_processes_that_make_it_at_once_all_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: make_secret(tmp_path / "secret"), range(64)))
    assert len(set(made)) == 1
    assert [it.name for it in tmp_path.iterdir()] == ["secret"]


def test_a_disk_without_room_is_named_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*secret'"):
        make_secret(tmp_path / "secret")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "\n", " \n", "two\nlines", "sécret"])
def test_what_no_header_could_carry_is_no_secret(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="secret"):
        read_secret(path)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (bearer("s3cret"), True),
        ({}, False),
        ({"authorization": ""}, False),
        ({"authorization": "s3cret"}, False),
        ({"authorization": "Bearer s3cre"}, False),
        ({"authorization": "Bearer s3cret "}, False),
        ({"authorization": "Bearer é"}, False),
        ({"x-authorization": "Bearer s3cret"}, False),
    ],
)
def test_only_the_whole_secret_opens(headers: dict[str, str], expected: bool) -> None:
    assert authorized(headers, "s3cret") is expected


async def test_a_route_that_needs_the_secret_says_401_without_it() -> None:
    async def inside(request: Request) -> Response:
        return PlainTextResponse("inside")

    route = Route("/", inside, middleware=[Middleware(NeedsSecret, secret="s3cret")])
    async with serving(Starlette(routes=[route])) as url, httpx2.AsyncClient() as client:
        refusal = await client.get(url)
        assert (refusal.status_code, refusal.headers["www-authenticate"]) == (401, "Bearer")
        assert (await client.get(url, headers=bearer("wrong"))).status_code == 401
        assert (await client.get(url, headers=bearer("s3cret"))).text == "inside"
