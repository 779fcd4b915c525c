"""Servers to compare: each a process to start, a place to ask, and how to make it ready.

What each needs to compute the same as the others, in BF16 and without a prefix cache, is said here
once. Knows no measuring beyond the first token.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Protocol

import anyio
from anyio.abc import Process

from loadtest.bench.client import Client, Target, client, wait_ready
from loadtest.bench.memory import watch_memory
from loadtest.bench.words import prompt
from routing.children import bind

READY_S = 300.0  # vLLM compiles for more than a minute
STOP_S = 10.0  # from SIGTERM to SIGKILL
FIRST_WORDS = 16  # of the first prompt of a new server
KV_TOKENS = 16384  # reserved by every server
FILLING = 8  # requests that use nearly all of them together
FILLING_PROMPT, FILLING_OUTPUT = 1920, 96  # tokens; output enough to outlast the others' prompts
_WORDS_ALLOWANCE = 64  # of a prompt's tokens, for a chat template


class NotUp(Exception):
    """A server ended while it was starting."""


class Contestant(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def serving(self, log: Path) -> AbstractAsyncContextManager[Target]:
        """Started, and ready to be asked, for the length of the block."""
        ...

    async def first_token_s(self, log: Path) -> float:
        """From starting the process to its first token; it is stopped again."""
        ...

    async def peak_bytes(self, log: Path) -> int:
        """The most memory from its start to nearly full KV; it is stopped again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server of others: one command, chat completions under /v1."""

    name: str
    version: str
    words: Sequence[str]  # the command; {port} is put in
    model: str
    extra: Mapping[str, object] = field(default_factory=dict)  # of every request's body

    @asynccontextmanager
    async def serving(self, log: Path) -> AsyncGenerator[Target, None]:
        port = free_port()
        async with running(self._command(port), log) as process:
            await wait_up(process, f"http://127.0.0.1:{port}/health")
            yield self._target(port)

    async def first_token_s(self, log: Path) -> float:
        began = perf_counter()
        async with self.serving(log) as target, client(target) as asking:
            answer = await asking.ask(prompt(0, FIRST_WORDS), 1)
            return answer.texts[0] - began

    async def peak_bytes(self, log: Path) -> int:
        port = free_port()
        async with running(self._command(port), log) as process:
            with watch_memory(process.pid) as peak:
                await wait_up(process, f"http://127.0.0.1:{port}/health")
                async with client(self._target(port)) as asking:
                    await _fill(asking)
            return peak.pss_bytes

    def _command(self, port: int) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self.words]

    def _target(self, port: int) -> Target:
        return Target(url=f"http://127.0.0.1:{port}/v1", model=self.model, extra=self.extra)


def llama_cpp(server: Path, gguf: Path, threads: int) -> Peer:
    """llama.cpp's `llama-server` with a BF16 GGUF."""
    words = [str(server), "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}"]
    words += ["-t", str(threads), "-tb", str(threads), "-np", "32", "-c", str(KV_TOKENS)]
    return Peer(
        name="llama.cpp, BF16",
        version=_said([str(server), "--version"], "version: "),
        words=[*words, "--kv-unified"],
        model="peer",
        extra={"ignore_eos": True, "cache_prompt": False},
    )


def openvino(python: Path, exported: Path, model_dir: Path, threads: int) -> Peer:
    """OpenVINO GenAI's continuous batching behind `openvino_server`."""
    words = [sys.executable, "-m", "loadtest.bench.openvino_server", "--port", "{port}"]
    words += ["--python", str(python), "--model", str(exported), "--model-dir", str(model_dir)]
    said = _said([str(python), "-c", "import openvino_genai; print(openvino_genai.__version__)"])
    return Peer(
        name="OpenVINO GenAI, BF16",
        version=said.partition("-")[0],
        words=[*words, "--kv-tokens", str(KV_TOKENS), "--threads", str(threads)],
        model="peer",
    )


def vllm(python: Path, preload: Path | None, model_dir: Path) -> Peer:
    """vLLM's CPU build; `preload` is the allocator that its documentation asks for."""
    words = ["env", *([f"LD_PRELOAD={preload}"] if preload else []), "VLLM_CPU_KVCACHE_SPACE=1"]
    words += [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    words += ["--served-model-name", "peer", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    words += ["--port", "{port}", "--no-enable-prefix-caching", "--max-num-seqs", "64"]
    return Peer(
        name="vLLM CPU, BF16",
        version=_said([str(python), "-c", "import vllm; print(vllm.__version__)"]),
        words=words,
        model="peer",
        extra={"ignore_eos": True},
    )


@asynccontextmanager
async def running(
    words: Sequence[str], log: Path, pass_fds: Sequence[int] = ()
) -> AsyncGenerator[Process, None]:
    """A process in a group of its own, which has ended, all of it, when the block is left."""
    with log.open("ab") as file:
        process = await anyio.open_process(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def wait_up(process: Process, url: str) -> None:
    """Until GET `url` is answered with 200. NotUp when that will not be."""
    async with anyio.create_task_group() as tasks:

        async def until_ended() -> None:
            code = await process.wait()
            raise NotUp(f"ended with exit code {code} before it was ready; see its log")

        tasks.start_soon(until_ended)
        await wait_ready(url, READY_S)
        tasks.cancel_scope.cancel()


def free_port() -> int:
    """One that nobody listens on now."""
    with bind("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        return port


async def _stop(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    with anyio.move_on_after(STOP_S):
        await process.wait()
    with suppress(ProcessLookupError):  # also what it has left behind
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _fill(asking: Client) -> None:
    """Requests that have nearly all of the KV in use at once."""
    async with anyio.create_task_group() as tasks:
        for seed in range(FILLING):
            words = prompt(seed, FILLING_PROMPT - _WORDS_ALLOWANCE)
            tasks.start_soon(asking.ask, words, FILLING_OUTPUT)


def _said(words: Sequence[str], mark: str = "") -> str:
    """The rest of the last line that begins with `mark`, wherever the command says it."""
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next(line for line in reversed(lines) if line.startswith(mark)).removeprefix(mark)
