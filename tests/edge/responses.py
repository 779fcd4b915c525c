"""Turns and answers of Responses."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from edge.ask import Piece
from edge.responses import Turn, parse
from edge.responses_answer import Answer
from tests.edge.streams import events

BODY = {"model": "@cf/test/model", "input": "Hello"}


EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(**fields: Any) -> Turn:
    return parse(json.dumps(BODY | fields).encode())


def stream(to: Answer, *pieces: Piece) -> list[dict[str, Any]]:
    """The events of these pieces, each checked."""
    told = events(b"".join(map(to.frames, pieces)))
    for number, (name, data) in enumerate(told):
        assert data["type"] == name
        assert data["sequence_number"] == number
        EVENT.validate_python(data)
    return [data for _, data in told]
