"""Servers to compare: each a process to start, a place to ask, and how to make it ready.

What each needs to compute the same as the others, without a prefix cache and in BF16 or what is
faster here and loses nothing, is said here once. Knows no measuring beyond the first token.
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
VLLM_BLOCK_TOKENS = 128  # of KV, its own choice on a CPU
TRANSFORMERS_BLOCK_TOKENS = 256  # of KV, as `transformers serve` has it
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
    marks_end: bool = True  # of an answer, by [DONE]

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
        url = f"http://127.0.0.1:{port}/v1"
        return Target(url=url, model=self.model, extra=self.extra, marks_end=self.marks_end)


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


def openvino(python: Path, exported: Path, model_dir: Path, *, threads: int, bf16: bool) -> Peer:
    """OpenVINO GenAI's continuous batching behind `openvino_server`.

    Without instructions for BF16 it computes in FP32, with KV in FP16: it refuses KV in BF16 there.
    """
    precision, kv_precision = ("bf16", "bf16") if bf16 else ("f32", "f16")
    words = [sys.executable, "-m", "loadtest.bench.openvino_server", "--port", "{port}"]
    words += ["--python", str(python), "--model", str(exported), "--model-dir", str(model_dir)]
    words += ["--precision", precision, "--kv-precision", kv_precision]
    said = _said([str(python), "-c", "import openvino_genai; print(openvino_genai.__version__)"])
    return Peer(
        name=f"OpenVINO GenAI, {'BF16' if bf16 else 'FP32 with KV in FP16'}",
        version=said.partition("-")[0],
        words=[*words, "--kv-tokens", str(KV_TOKENS), "--threads", str(threads)],
        model="peer",
    )


def vllm(python: Path, preload: str | None, model_dir: Path, *, bf16: bool) -> Peer:
    """vLLM's CPU build; `preload` is what its documentation asks for: an allocator and OpenMP.

    Without instructions for BF16 it computes in FP32, as its BF16 is slower there. It gets every
    core, as the others do: by itself it leaves one to its server.
    """
    words = ["env", *([f"LD_PRELOAD={preload}"] if preload else []), "VLLM_CPU_KVCACHE_SPACE=1"]
    words += ["VLLM_CPU_NUM_OF_RESERVED_CPU=0"]
    words += [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    words += ["--served-model-name", "peer", "--dtype", _torch_dtype(bf16=bf16)]
    words += ["--host", "127.0.0.1", "--port", "{port}"]
    blocks = ["--block-size", str(VLLM_BLOCK_TOKENS)]
    blocks += ["--num-gpu-blocks-override", str(KV_TOKENS // VLLM_BLOCK_TOKENS)]  # CPU's, too
    return Peer(
        name=f"vLLM CPU, {'BF16' if bf16 else 'FP32'}",
        version=_said([str(python), "-c", "import vllm; print(vllm.__version__)"]),
        words=[*words, "--no-enable-prefix-caching", "--max-num-seqs", "64", *blocks],
        model="peer",
        extra={"ignore_eos": True},
    )


def transformers(python: Path, model_dir: Path, *, bf16: bool) -> Peer:
    """`transformers serve` with continuous batching, from the same environment as `python`.

    Without instructions for BF16 it computes in FP32: torch's BF16 is several times slower there.
    Blocks that prompts share cannot be switched off; these prompts share none.
    """
    words = [str(python.with_name("transformers")), "serve", str(model_dir), "--device", "cpu"]
    words += ["--dtype", _torch_dtype(bf16=bf16), "--continuous-batching"]
    words += ["--cb-num-blocks", str(KV_TOKENS // TRANSFORMERS_BLOCK_TOKENS)]
    return Peer(
        name=f"transformers serve, {'BF16' if bf16 else 'FP32'}",
        version=_said([str(python), "-c", "import transformers as t; print(t.__version__)"]),
        words=[*words, "--host", "127.0.0.1", "--port", "{port}"],
        model=str(model_dir),  # it answers to no other name
        # no ignore_eos, but a whole generation config, in which no id ends an answer
        extra={"generation_config": '{"eos_token_id": -1, "do_sample": false}'},
        marks_end=False,
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


def _torch_dtype(*, bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"


def _said(words: Sequence[str], mark: str = "") -> str:
    """The rest of the last line that begins with `mark`, wherever the command says it."""
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next(line for line in reversed(lines) if line.startswith(mark)).removeprefix(mark)
