"""JavaScript's clients as senders: each is a process of `js/sender.mjs`."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import anyio
from anyio import to_thread
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from tests.clients.fields import VECTORS, Route, Row
from tests.clients.senders import Sender
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT

JS = Path(__file__).parent / "js"
NODE, NPM = shutil.which("node"), shutil.which("npm")


def install() -> Path:
    """The packages of js/package.json, fetched once."""
    assert NPM is not None
    with (JS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = JS / "node_modules" / ".installed"
        wanted = (JS / "package.json").read_text()
        if not stamp.exists() or stamp.read_text() != wanted:
            words = [NPM, "install", "--no-audit", "--no-fund", "--no-package-lock"]
            subprocess.run(words, cwd=JS, check=True, capture_output=True, timeout=300)
            stamp.write_text(wanted)
    return JS


class JavaScript(Sender):
    _process: Process
    _heard = ""

    async def __aenter__(self) -> Self:
        folder = await to_thread.run_sync(install)
        about = (self.edge.url, ACCOUNT, self.edge.key, MODEL, VECTORS)
        words = [str(NODE), "sender.mjs", self.name, *about]
        process = await anyio.open_process(words, cwd=folder, stderr=None)
        self._process = await self.stack.enter_async_context(process)
        self.stack.callback(self._process.terminate)
        assert self._process.stdout is not None
        self._lines = TextReceiveStream(self._process.stdout)
        return self

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        await self._process.stdin.send(json.dumps({"route": route, "body": body}).encode() + b"\n")
        with anyio.fail_after(60):
            while "\n" not in self._heard:
                self._heard += await self._lines.receive()
        line, _, self._heard = self._heard.partition("\n")
        said = json.loads(line)
        assert "failed" not in said, said["failed"]
        return said["answer"]


class OpenAIJavaScript(JavaScript):
    name = "openai.js"
    routes = frozenset({"chat", "completions", "embeddings", "responses"})


class CloudflareJavaScript(JavaScript):
    name = "cloudflare.js"
    routes = frozenset({"run", "vectors"})


class AnthropicJavaScript(JavaScript):
    name = "anthropic.js"
    routes = frozenset({"messages"})


class _Sdk(JavaScript):
    """The AI SDK: it has an answer of its own, so rows are seen where regions are asked."""

    fields: ClassVar[Mapping[Route, frozenset[str] | None]]  # that it has a way to send; None: any

    @classmethod
    def sends(cls, row: Row) -> bool:
        """Not prompts: it has messages only."""
        if not super().sends(row) or row.of_answer or "prompt" in row.body:
            return False
        fields = cls.fields[row.route]
        return fields is None or row.field in fields


_SPOKEN = ("messages", "max_tokens", "temperature", "top_p", "tools", "tool_choice", "stream")


class AiSdk(_Sdk):
    """By @ai-sdk/openai-compatible, @ai-sdk/openai and @ai-sdk/anthropic."""

    name = "ai-sdk"
    routes = frozenset({"chat", "responses", "messages"})
    fields: ClassVar = {
        "chat": None,
        "responses": frozenset(
            [
                *("input", "max_output_tokens", "temperature", "top_p", "tools", "tool_choice"),
                *("parallel_tool_calls", "text", "stream", "instructions", "include"),
                "previous_response_id",
            ]
        ),
        "messages": frozenset([*_SPOKEN, "system", "top_k", "thinking", "output_config"]),
    }


class WorkersAiProvider(_Sdk):
    name = "workers-ai-provider"
    routes = frozenset({"run", "vectors"})
    fields: ClassVar = {
        "run": frozenset([*_SPOKEN, "response_format", "reasoning_effort", "chat_template_kwargs"]),
        "vectors": frozenset(["text", "query"]),
    }
