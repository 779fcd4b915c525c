"""A region that counts, and says what fits where an answer has to match something."""

from __future__ import annotations

from typing import Any

from routing import wire
from routing.link_server import Stream
from tests.fakes.counting_region import CountingRegion

OBJECT = '{"a": 1}'


class ObedientRegion(CountingRegion):
    """Its model writes calls as `tool_families.py`'s `prompted` has them."""

    async def _count(self, stream: Stream[Any, wire.Event], request: wire.Generate) -> None:
        text = _fitting(request.grammar)
        if text is None:
            await super()._count(stream, request)
            return
        stream.send(wire.Started(0))
        stream.send(wire.Tokens(tuple(text.encode())))
        used = wire.Usage(prompt_tokens=len(request.token_ids), completion_tokens=len(text))
        stream.send(wire.Finish("stop", used))


def _fitting(grammar: wire.Grammar | None) -> str | None:
    """For the schemas and tools of `tests/clients/rows.py`."""
    if grammar is None or grammar.kind in {"regex", "choice"}:
        return None
    if grammar.kind != "lark":
        return OBJECT
    if "weather" in grammar.source:
        return f'<tool_call>\n{{"name": "weather", "arguments": {OBJECT}}}\n</tool_call>'
    if "clock" in grammar.source:
        return '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    return None
