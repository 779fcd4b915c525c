"""The first request to a fleet: what is asked of a model of each task, and what is shown."""

from __future__ import annotations

import shlex

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from routing.firstrun import QUESTION, Caller, FirstRunFailed, curl_line, first_run
from tests.fakes.serving import serving


def caller(url: str) -> Caller:
    return Caller(edge_url=url, account="demo", key="k", model="@cf/a/b", task="text-embeddings")


async def answered(request: Request) -> Response:
    if await request.json() != {"text": QUESTION}:
        return JSONResponse({"errors": ["not asked as such a model is"]}, 400)
    vectors = {"shape": [1, 3], "data": [[0.1, 0.2, 0.3]], "pooling": "mean"}
    return JSONResponse({"result": vectors}, headers={"x-served-by": "weur"})


async def test_a_model_that_makes_vectors_is_asked_for_one() -> None:
    shown: list[str] = []
    app = Starlette(routes=[Route("/client/{rest:path}", answered, methods=["POST"])])
    async with serving(app) as url:
        outcome = await first_run(caller(url), shown.append)
    assert shown == ["a vector of 3 numbers"]
    [line] = outcome.lines()
    assert line.startswith("served by weur ")


def test_the_curl_line_asks_the_same() -> None:
    words = shlex.split(curl_line(caller("http://h:1")))
    assert msgspec.json.decode(words[-1]) == {"text": QUESTION}


async def test_nobody_there_is_a_failure() -> None:
    with pytest.raises(FirstRunFailed, match="127"):
        await first_run(caller("http://127.0.0.1:9"), lambda _: None)
