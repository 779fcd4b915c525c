"""Every field of every route, from every client that has it: the table in edge/README.md.

One cell is `pytest "tests/clients/test_fields.py::test_a_field[chat-seed-openai]"`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.clients.cells import CELLS, name, table
from tests.clients.fields import PREVIOUS, SCHEMAS, TEMPLATE, VECTORS, Heard, Row
from tests.clients.javascript import NODE, NPM, JavaScript
from tests.clients.rows_of_shapes import ROWS
from tests.clients.senders import Sender
from tests.fakes.counting_region import CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.obedient_region import ObedientRegion
from tests.fakes.saying_region import assets_with

# LangChain's and LiteLLM's own modules warn.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]
Senders = Callable[[type[Sender]], Awaitable[Sender]]
README = Path(__file__).parents[2] / "edge" / "README.md"


@pytest.fixture(scope="module")
async def regions() -> AsyncIterator[list[CountingRegion]]:
    """One that makes text and one that makes vectors."""
    text = ObedientRegion(assets=assets_with(TEMPLATE))
    vectors = CountingRegion("enam", model=VECTORS, task="text-embeddings")
    async with running(text, vectors):
        yield [text, vectors]


@pytest.fixture(scope="module")
async def edge(
    regions: list[CountingRegion], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EdgeClient]:
    home: Path = tmp_path_factory.mktemp("fields")
    asked = [one.region for one in regions]
    async with edge_over(home, asked, store=home / "store.sqlite") as client:
        yield client


@pytest.fixture(scope="module")
async def senders(edge: EdgeClient) -> AsyncIterator[Senders]:
    made: dict[type[Sender], Sender] = {}

    async def sender(kind: type[Sender]) -> Sender:
        """Each is set up once, and only where it is asked for."""
        if kind not in made:
            made[kind] = await stack.enter_async_context(kind(edge))
        return made[kind]

    async with AsyncExitStack() as stack:
        yield sender


@pytest.mark.parametrize(("row", "kind"), [pytest.param(*cell, id=name(*cell)) for cell in CELLS])
async def test_a_field(
    row: Row, kind: type[Sender], senders: Senders, regions: list[CountingRegion]
) -> None:
    if issubclass(kind, JavaScript) and (NODE is None or NPM is None):
        pytest.skip("node and npm are not on the PATH")
    sender = await senders(kind)
    text, vectors = regions
    text.asked.clear()
    vectors.embeds.clear()
    body = row.whole
    if body.get("previous_response_id") == PREVIOUS:
        first = {"model": body["model"], "input": "hello", "max_output_tokens": 2}
        before: Any = await sender.ask(row.route, first)
        body["previous_response_id"] = before["id"]
    answer = await sender.ask(row.route, body)
    assert row.seen(Heard(asked=text.asked, embeds=vectors.embeds, answer=answer)) == row.want


@pytest.mark.parametrize("route", SCHEMAS)
def test_no_field_is_forgotten(route: str) -> None:
    """The published schema has these fields and no others."""
    published = set().union(*(schema["properties"] for schema in SCHEMAS[route]))
    assert {row.field for row in ROWS if row.route == route} == published


def test_the_readme_has_every_cell() -> None:
    assert table() in README.read_text()
