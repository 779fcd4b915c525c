"""The table of edge/README.md: which client sends which fields to which route.

python -m tests.clients.cells      prints it
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.fields import SCHEMAS, Route, Row
from tests.clients.frameworks import LangChain, LiteLLM
from tests.clients.javascript import (
    AiSdk,
    AnthropicJavaScript,
    CloudflareJavaScript,
    OpenAIJavaScript,
    WorkersAiProvider,
)
from tests.clients.rows_of_shapes import ROWS
from tests.clients.senders import AnthropicPython, CloudflarePython, Http, OpenAIPython, Sender

SENDERS: tuple[type[Sender], ...] = (
    Http,
    OpenAIPython,
    OpenAIJavaScript,
    CloudflarePython,
    CloudflareJavaScript,
    AnthropicPython,
    AnthropicJavaScript,
    AiSdk,
    WorkersAiProvider,
    LiteLLM,
    LangChain,
)
CELLS = [(row, sender) for row in ROWS for sender in SENDERS if sender.sends(row)]


def name(row: Row, sender: type[Sender]) -> str:
    """Of a cell's test."""
    return f"{row.route}-{row.field}-{sender.name}"


def table() -> str:
    """Markdown. Fields that the same clients send stand together."""
    names = [sender.name for sender in SENDERS]
    lines = [f"| route | fields | {' | '.join(names)} |", "|---|---|" + ":-:|" * len(names)]
    for route in SCHEMAS:
        for senders, fields in _together(route):
            marks = ["x" if sender in senders else "" for sender in SENDERS]
            told = ", ".join(f"`{field}`" for field in fields)
            lines.append(f"| {route} | {told} | {' | '.join(marks)} |")
    return "\n".join(lines)


def _together(route: Route) -> Iterator[tuple[tuple[type[Sender], ...], list[str]]]:
    """Those clients that send the most fields first."""
    fields: dict[tuple[type[Sender], ...], list[str]] = {}
    for row in ROWS:
        if row.route == route:
            senders = tuple(sender for sender in SENDERS if sender.sends(row))
            fields.setdefault(senders, []).append(row.field)
    yield from sorted(fields.items(), key=lambda entry: -len(entry[0]))


if __name__ == "__main__":
    print(table())
