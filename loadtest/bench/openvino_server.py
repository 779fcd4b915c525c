"""A peer to measure against: OpenVINO GenAI behind chat completions, streamed.

The engine is a process of its own, as ours is, and speaks in ids; text is made here, by the edge's
own tokenizer and JSON. Every answer has `max_tokens` tokens, greedy: nothing else is measured.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer
from anyio.abc import Process
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from edge import openai
from edge.ask import Ask, End, Text, Usage
from edge.tokenizer import ModelText
from origin_gpu.models import read_assets
from routing.serving import serve_app

PROGRAM = Path(__file__).with_name("openvino_engine.py")

News = tuple[int, list[int], bool]  # of one request in one step: its number, new ids, ended
Sink = MemoryObjectSendStream[list[int]]
Bursts = MemoryObjectReceiveStream[list[int]]


class EngineProcess:
    """The engine's end here: who waits for the ids of which number."""

    def __init__(self, process: Process) -> None:
        self.ready = False
        self._process = process
        self._sinks: dict[int, Sink] = {}
        self._count = 0
        self._unsent, self._to_send = anyio.create_memory_object_stream[bytes](math.inf)

    def generate(self, ids: tuple[int, ...], max_tokens: int) -> Bursts:
        """New ids as steps bring them. A client that leaves does not stop the engine."""
        self._count += 1
        sink, bursts = anyio.create_memory_object_stream[list[int]](max_tokens)
        self._sinks[self._count] = sink
        self._unsent.send_nowait(msgspec.json.encode([self._count, ids, max_tokens]) + b"\n")
        return bursts

    async def write(self) -> None:
        assert self._process.stdin is not None
        async for line in self._to_send:
            await self._process.stdin.send(line)

    async def read(self) -> None:
        """To the end of the process."""
        assert self._process.stdout is not None
        decode = msgspec.json.Decoder(list[News] | str).decode
        partial = b""
        async for chunk in self._process.stdout:
            *lines, partial = (partial + chunk).split(b"\n")
            for line in lines:
                self._hear(decode(line))

    def _hear(self, said: list[News] | str) -> None:
        if isinstance(said, str):
            self.ready = True
            return
        for number, ids, ended in said:
            with suppress(anyio.BrokenResourceError):  # its client has gone
                self._sinks[number].send_nowait(ids)
            if ended:
                self._sinks.pop(number).close()


class Chat:
    """Answers one path."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._engine: EngineProcess | None = None

    @asynccontextmanager
    async def engine(self, command: list[str]) -> AsyncGenerator[None, None]:
        async with await anyio.open_process(command, stderr=None) as process:
            self._engine = EngineProcess(process)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._engine.read)
                tasks.start_soon(self._engine.write)
                yield
                process.kill()
                tasks.cancel_scope.cancel()

    async def ready(self, request: Request) -> Response:
        is_ready = self._engine is not None and self._engine.ready
        return PlainTextResponse("", 200 if is_ready else 503)

    async def complete(self, request: Request) -> Response:
        ask = openai.parse(await request.body())
        return StreamingResponse(self._frames(ask), media_type="text/event-stream")

    async def _frames(self, ask: Ask) -> AsyncIterator[bytes]:
        assert self._engine is not None
        assert ask.sampling.max_tokens is not None
        answer = openai.Answer(ask, request_id="peer", created=0)
        ids, stream = self._text.encode_prompt(ask), self._text.stream()
        num_output = 0
        async for burst in self._engine.generate(ids, ask.sampling.max_tokens):
            num_output += len(burst)
            if frames := answer.frames(Text(text=stream.push(burst))):
                yield frames
        usage = Usage(prompt_tokens=len(ids), completion_tokens=num_output)
        yield answer.frames(End(reason="length", usage=usage))


def run(  # noqa: PLR0913  one parameter a flag
    *,
    python: Annotated[str, typer.Option(help="The Python that has openvino_genai.")],
    model: Annotated[str, typer.Option(help="Folder that optimum-cli exported.")],
    model_dir: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    port: Annotated[int, typer.Option()],
    kv_tokens: Annotated[int, typer.Option(min=1)] = 16384,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    precision: Annotated[str, typer.Option(help="Of arithmetic, as OpenVINO names it.")] = "bf16",
    kv_precision: Annotated[str, typer.Option(help="Of keys and values.")] = "bf16",
) -> None:
    """Serve until told to stop."""
    chat = Chat(ModelText(read_assets(model_dir)))
    command = [python, str(PROGRAM), "--model", model]
    command += ["--kv-tokens", str(kv_tokens), "--threads", str(threads)]
    command += ["--precision", precision, "--kv-precision", kv_precision]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        async with chat.engine(command):
            yield

    app = Starlette(
        routes=[
            Route("/health", chat.ready),
            Route("/v1/chat/completions", chat.complete, methods=["POST"]),
        ],
        lifespan=lifespan,
    )
    serve_app(app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    typer.run(run)
