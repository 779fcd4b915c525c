"""JavaScript's clients of Responses and Messages: openai, Anthropic's SDK, the AI SDK."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.test_javascript import heard, installed
from tests.fakes.edge_client import EdgeClient

__all__ = ["installed"]  # a fixture


@pytest.mark.timeout(400)
async def test_all_of_them(edge: EdgeClient, installed: Path) -> None:
    said = await heard(edge, installed, "shapes.mjs")
    last = "response.incomplete"
    assert said["openai"] == {"whole": "ABCD", "text": "ABCD", "last": last, "more": True}
    assert said["anthropic"] == {
        "whole": "ABCD",
        "text": "ABCD",
        "counted": True,
        "used": 4,
        "reason": "max_tokens",
        "refused": "BadRequestError invalid_request_error",
    }
    heard_by_sdk = {"whole": "ABCD", "text": "ABCD", "used": 4, "reason": "length", "more": True}
    for name in ("responses", "messages"):
        assert said[name] == heard_by_sdk, name
