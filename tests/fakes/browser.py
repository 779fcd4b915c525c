"""A headless Chromium with one page, driven over its debugging protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import itertools
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
from websockets.asyncio.client import ClientConnection, connect

START_S, LOOK_S = 60.0, 0.05
_MOST_BYTES = 1 << 26  # of a message: a screenshot is one


class Page:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []  # what scripts threw, and what the policy forbade

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        sent = {"id": number, "method": method, "params": params}
        await self._socket.send(msgspec.json.encode(sent).decode())
        while True:
            said = msgspec.json.decode(await self._socket.recv())
            if said.get("id") == number:
                assert "error" not in said, said
                return dict(said["result"])
            self._hear(said.get("method"), said.get("params", {}))

    def _hear(self, event: str | None, told: dict[str, Any]) -> None:
        is_entry = event == "Log.entryAdded" and told["entry"]["level"] == "error"
        if is_entry or event == "Runtime.exceptionThrown":
            self.errors.append(str(told))

    async def go(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, script: str) -> Any:
        """Of an expression, which may be a promise."""
        said = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, script: str, within_s: float = 30.0) -> None:
        """Until an expression is true."""
        with anyio.fail_after(within_s):
            while not await self.value(f"Boolean({script})"):
                await anyio.sleep(LOOK_S)

    async def screenshot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(chromium: str, home: Path) -> AsyncGenerator[Page, None]:
    """It and its page are gone when the block is left."""
    words = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    words += ["--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={home}"]
    process = await anyio.open_process(
        [*words, "--window-size=1280,800", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = await _page_of(home / "DevToolsActivePort")
        async with connect(address, max_size=_MOST_BYTES, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        with anyio.CancelScope(shield=True):
            await process.wait()


async def _page_of(file: Path) -> str:
    """The address of the page's socket, once the browser has written where it listens."""
    with anyio.fail_after(START_S):
        while not file.exists() or len(file.read_text().splitlines()) < 2:
            await anyio.sleep(LOOK_S)
        port = file.read_text().splitlines()[0]
        async with httpx2.AsyncClient(trust_env=False) as client:
            while True:
                targets = (await client.get(f"http://127.0.0.1:{port}/json")).json()
                for target in targets:
                    if target["type"] == "page":
                        return str(target["webSocketDebuggerUrl"])
                await anyio.sleep(LOOK_S)
