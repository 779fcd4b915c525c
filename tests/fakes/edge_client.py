"""An edge on a real socket over fake regions, and what a client does with it."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
from anyio.abc import SocketAttribute, SocketStream

from edge import keys
from edge.app import create_app, unix_time
from edge.settings import Settings
from routing.region import Region
from routing.serving import listening_socket
from tests.fakes.counting_region import MODEL, SECRET
from tests.fakes.serving import serving

ACCOUNT = "acme"
NEAR_WEUR = {"cf-iplatitude": "48.86", "cf-iplongitude": "2.35"}  # Paris
NEAR_ENAM = {"cf-iplatitude": "42.36", "cf-iplongitude": "-71.06"}  # Boston


@dataclass(frozen=True, kw_only=True)
class EdgeClient:
    url: str
    key: str
    http: httpx2.AsyncClient

    @property
    def ai(self) -> str:
        return f"{self.url}/client/v4/accounts/{ACCOUNT}/ai"

    @property
    def run_url(self) -> str:
        return f"{self.ai}/run/{MODEL}"

    @property
    def chat_url(self) -> str:
        return f"{self.ai}/v1/chat/completions"

    def headers(self, near: dict[str, str] = NEAR_WEUR) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", **near}

    async def raw(self, prompt: str, max_tokens: int = 5, **fields: object) -> httpx2.Response:
        body = {"prompt": prompt, "raw": True, "max_tokens": max_tokens, **fields}
        return await self.http.post(self.run_url, json=body, headers=self.headers())

    async def chat(self, text: str, **fields: object) -> httpx2.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post(self.chat_url, json=body, headers=self.headers())

    @asynccontextmanager
    async def stream(
        self,
        prompt: str,
        max_tokens: int = 5,
        near: dict[str, str] = NEAR_WEUR,
        **fields: object,
    ) -> AsyncIterator[httpx2.Response]:
        body = {"prompt": prompt, "raw": True, "max_tokens": max_tokens, "stream": True, **fields}
        async with self.http.stream(
            "POST", self.run_url, json=body, headers=self.headers(near)
        ) as response:
            yield response

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        text = (await self.http.get(f"{self.url}/metrics")).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.split("{")[0].split(" ")[0] == name and all(label in line for label in wanted)
        )

    async def wait_metric(self, name: str, value: float, **labels: str) -> None:
        with anyio.fail_after(10):
            while await self.metric(name, **labels) != value:
                await anyio.sleep(0.01)

    async def connect(
        self, body: bytes, *, content_length: int | None = None, receive_bytes: int | None = None
    ) -> SocketStream:
        """A bare connection that has sent `body` to `run_url`; `receive_bytes`: what its kernel
        takes before the edge has to wait for it."""
        host, port = self.url.removeprefix("http://").split(":")
        stream = await anyio.connect_tcp(host, int(port))
        if receive_bytes is not None:
            sock = stream.extra(SocketAttribute.raw_socket)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        length = len(body) if content_length is None else content_length
        lines = [f"POST {self.run_url.removeprefix(self.url)} HTTP/1.1", "host: edge"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        lines += [f"content-length: {length}", "", ""]
        await stream.send("\r\n".join(lines).encode() + body)
        return stream


def settings(home: Path, regions: Sequence[Region], **more: Any) -> Settings:
    return Settings(
        regions=tuple(regions),
        secret=SECRET,
        keys_dir=home / "keys",
        cache_dir=home / "cache",
        **more,
    )


@asynccontextmanager
async def edge_over(
    home: Path,
    regions: Sequence[Region],
    *,
    wait_ready: bool = True,
    send_bytes: int | None = None,
    **more: Any,
) -> AsyncGenerator[EdgeClient, None]:
    """An edge over `regions`, ready; `more` are settings.

    `send_bytes`: what the kernel takes of an answer before the edge has to wait for the client.
    """
    listener = listening_socket("127.0.0.1", 0)
    if send_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    made = settings(home, regions, **more)
    key = keys.create(made.keys_dir, ACCOUNT, days=1, now=unix_time())
    limits = httpx2.Limits(max_connections=500, max_keepalive_connections=20)
    async with (
        serving(create_app(made), listener) as url,
        httpx2.AsyncClient(trust_env=False, timeout=30, limits=limits) as http,
    ):
        client = EdgeClient(url=url, key=key, http=http)
        if wait_ready:
            with anyio.fail_after(20):
                while (await http.get(f"{url}/ready")).status_code != 200:
                    await anyio.sleep(0.01)
        yield client
