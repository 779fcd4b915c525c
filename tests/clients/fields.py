"""Every field of every route that runs a model: a body with it, and what must come of it.

What comes of a field is seen either where a region is asked (`wire.Generate`, `wire.Embed`) or in
the answer. Rows are by the properties of the published schemas, and none may be missing: a test
compares. Who sends the bodies is `senders.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

from edge import schemas
from edge.schemas import Schema
from routing import wire
from tests.fakes.counting_region import MODEL
from tests.fakes.model_folder import CHAT_TEMPLATE

VECTORS = "@cf/test/vectors"
NOBODY = "@cf/no/model"
PREVIOUS = "the id of an answer to the same without more"
TEMPLATE = "{{ reasoning_effort }}{{ mood }}" + CHAT_TEMPLATE  # tells what it was given

Route = Literal["run", "vectors", "chat", "completions", "embeddings", "responses", "messages"]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
# What a body has where a row says nothing else of it.
BASE: Mapping[Route, Mapping[str, Any]] = {
    "run": {"messages": HELLO, "max_tokens": 2},
    "vectors": {},
    "chat": {"model": MODEL, "messages": HELLO, "max_tokens": 2},
    "completions": {"model": MODEL, "prompt": "A", "max_tokens": 2},
    "embeddings": {"model": VECTORS, "input": "hello"},
    "responses": {"model": MODEL, "input": "hello", "max_output_tokens": 2},
    "messages": {"model": MODEL, "messages": HELLO, "max_tokens": 2},
}
SCHEMAS: Mapping[Route, tuple[Schema, ...]] = {
    "run": tuple(schemas.GENERATION_INPUT["oneOf"]),
    "vectors": tuple(schemas.EMBEDDING_INPUT["oneOf"]),
    "chat": (schemas.CHAT_INPUT,),
    "completions": (schemas.COMPLETION_INPUT,),
    "embeddings": (schemas.EMBEDDINGS_INPUT,),
    "responses": (schemas.RESPONSES_INPUT,),
    "messages": (schemas.MESSAGES_INPUT,),
}


@dataclass(kw_only=True)
class Heard:
    """What came of one body."""

    asked: list[wire.Generate]
    embeds: list[wire.Embed]
    answer: Any  # the JSON of it; of a stream, a list of the JSON of its events

    @property
    def prompt(self) -> str:
        """What the model read, without its special tokens."""
        return bytes(at for at in self.asked[-1].token_ids if at < 256).decode()


Seen = Callable[[Heard], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    route: Route
    field: str
    body: Mapping[str, Any]
    seen: Seen
    want: object
    drops: tuple[str, ...] = ()  # of the route's base
    of_answer: bool = False  # seen in the answer's JSON

    @property
    def whole(self) -> dict[str, Any]:
        base = {name: it for name, it in BASE[self.route].items() if name not in self.drops}
        return deepcopy(base | dict(self.body))  # some clients write into what they are given


def sampling(name: str) -> Seen:
    return lambda heard: getattr(heard.asked[-1].sampling, name)


def grammar(heard: Heard) -> object:
    asked = heard.asked[-1].grammar
    return None if asked is None else asked.kind


def calls(heard: Heard) -> object:
    """Tools that have to be called, and whether there may be more than one: by the grammar."""
    asked = heard.asked[-1].grammar
    assert asked is not None
    return [name for name in ("weather", "clock") if name in asked.source], "call)*" in asked.source


def reads(*words: str) -> Seen:
    """Which of these words the model reads."""
    return lambda heard: [word for word in words if word in heard.prompt]


def said(*path: Any) -> Seen:
    """What is at this path of the answer."""

    def seen(heard: Heard) -> object:
        found = heard.answer
        for step in path:
            found = found[step]
        return found

    return seen


def choices(*path: Any) -> Seen:
    """What is at this path of each choice."""
    return lambda heard: [
        said(*path)(replace(heard, answer=choice)) for choice in heard.answer["choices"]
    ]


def is_stream(heard: Heard) -> object:
    return isinstance(heard.answer, list) and len(heard.answer) > 1


def rows(
    routes: Route | tuple[Route, ...],
    name: str,
    body: Mapping[str, Any],
    seen: Seen,
    want: object,
    **more: Any,
) -> list[Row]:
    """One for each route."""
    each = (routes,) if isinstance(routes, str) else routes
    return [Row(route=it, field=name, body=body, seen=seen, want=want, **more) for it in each]
