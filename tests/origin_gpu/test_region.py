"""A whole region of real processes: a front, prefill and decode workers, engines that count."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from origin_gpu.models import read_assets
from routing import wire
from routing.errors import Code
from routing.link import Link
from routing.region import ProcessReport, RegionReport
from routing.secret import bearer, make_secret
from routing.serving import address, listening_socket
from tests.fakes.model_folder import make_counting_folder

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
MODEL = "@cf/test/counting"
START_S = 120.0  # for all processes, on a busy machine


@dataclass
class RealRegion:
    """The processes by name, a link to the front as an edge has one, and how all are asked."""

    folder: Path
    secret: str
    tokenizer_digest: str
    processes: dict[str, subprocess.Popen[bytes]]
    urls: dict[str, str]
    edge: Link[wire.Event]
    client: httpx2.AsyncClient

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def request(self, first: int, *, num_prompt: int = 2, num_tokens: int = 40) -> wire.Generate:
        """Its output is first + 1, first + 2, ... modulo 256."""
        return wire.Generate(
            request_id=f"r{first}",
            tenant_salt=b"",
            model=MODEL,
            tokenizer_digest=self.tokenizer_digest,
            token_ids=(first % 256,) * num_prompt,
            sampling=wire.Sampling(max_tokens=num_tokens, seed=1, temperature=0.0),
            budget_s=100.0,
        )

    async def answer(self, asked: wire.Generate) -> list[wire.Event]:
        with anyio.fail_after(100):
            async with self.edge.open(asked) as events:
                return [event async for event in events]

    async def report(self) -> RegionReport:
        response = await self.client.get(f"{self.urls['front']}/v1/report")
        return msgspec.json.decode(response.content, type=RegionReport)

    async def worker(self, name: str) -> ProcessReport:
        response = await self.client.get(f"{self.urls[name]}/v1/report")
        return msgspec.json.decode(response.content, type=ProcessReport)

    async def wait_ready(self, num_workers: int) -> None:
        with anyio.fail_after(START_S):
            while True:
                for name, process in self.processes.items():
                    assert process.poll() is None, (self.folder / f"{name}.log").read_text()
                try:
                    report = await self.report()
                except httpx2.TransportError:
                    report = None
                if report and sum(it.ready for it in report.processes) == num_workers + 1:
                    return
                await anyio.sleep(0.05)

    async def wait_idle(self, *names: str) -> None:
        """Until these workers have no request, and every block is free."""
        with anyio.fail_after(20):
            for name in names:
                while True:
                    it = await self.worker(name)
                    if it.free_blocks == it.total_blocks and not (it.in_flight or it.held):
                        break
                    await anyio.sleep(0.02)


@asynccontextmanager
async def real_region(
    folder: Path, *workers: str, step_s: float = 0.0, flags: tuple[str, ...] = ()
) -> AsyncGenerator[RealRegion, None]:
    """Started and ready; `workers` are names like prefill-0. All processes end with the block."""
    model_dir = make_counting_folder(folder / "model")
    secret = make_secret(folder / "secret")
    engine = f"{sys.executable} {ROOT}/tests/fakes/counting_engine.py --step-s {step_s}"
    model = ("--model", MODEL, "--model-dir", str(model_dir), "--engine-command", engine)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    urls: dict[str, str] = {}
    named = []
    for name in workers:
        role = name.partition("-")[0]
        words = ("worker", "--role", role, *model, *flags)
        processes[name], urls[name] = start(folder, name, *words)
        named += ["--worker", f"{name}={role}@{urls[name]}"]
    processes["front"], urls["front"] = start(
        folder, "front", "front", "--local-tokens", "0", *named
    )
    try:
        async with (
            httpx2.AsyncClient(headers=bearer(secret), timeout=60, trust_env=False) as client,
            anyio.create_task_group() as tasks,
        ):
            edge: Link[wire.Event] = Link(urls["front"], secret, wire.Event)
            tasks.start_soon(edge.run)
            digest = read_assets(model_dir).digest
            region = RealRegion(folder, secret, digest, processes, urls, edge, client)
            await region.wait_ready(len(workers))
            await edge.wait_connected()
            yield region
            tasks.cancel_scope.cancel()
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        codes = {name: process.wait(30) for name, process in processes.items()}
    assert set(codes.values()) <= {0, -signal.SIGKILL}, codes


def start(folder: Path, name: str, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """`python -m origin_gpu WORDS...` with its log in `folder`, and its URL."""
    common = ("--name", name, "--region", "here", "--secret-file", str(folder / "secret"))
    with listening_socket("127.0.0.1", 0) as listener, (folder / f"{name}.log").open("wb") as log:
        number = listener.fileno()
        command = [sys.executable, "-m", "origin_gpu", *words, *common, "--fd", str(number)]
        process = subprocess.Popen(command, pass_fds=[number], stdout=log, stderr=log, cwd=ROOT)
        return process, address(listener)


def ids(events: list[wire.Event]) -> list[int]:
    return [i for event in events if isinstance(event, wire.Tokens) for i in event.ids]


def counted(first: int, num_tokens: int) -> list[int]:
    return [(first + 1 + n) % 256 for n in range(num_tokens)]


def finish(num_prompt: int, num_tokens: int, cached_tokens: int = 0) -> wire.Finish:
    return wire.Finish(
        "length",
        wire.Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_tokens,
            cached_tokens=cached_tokens,
        ),
    )


async def test_the_decode_worker_computes_no_prompt_token(tmp_path: Path) -> None:
    async with real_region(tmp_path, "prefill-0", "decode-0") as region:
        events = await region.answer(region.request(7, num_prompt=1000))
        assert ids(events) == counted(7, 40)
        assert events[-1] == finish(1000, 40)
        assert (await region.worker("prefill-0")).prompt_tokens_computed == 1000
        assert (await region.worker("decode-0")).prompt_tokens_computed == 0
        await region.wait_idle("prefill-0", "decode-0")


@pytest.mark.slow
async def test_a_worker_of_both_roles_serves_alone(tmp_path: Path) -> None:
    async with real_region(tmp_path, "both-0") as region:
        events = await region.answer(region.request(7))
        assert ids(events) == counted(7, 40)
        assert events[-1] == finish(2, 40)


@pytest.mark.parametrize("num_streams", [200, pytest.param(1000, marks=pytest.mark.slow)])
async def test_many_requests_at_once_lose_no_token(tmp_path: Path, num_streams: int) -> None:
    workers = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    flags = ("--max-waiting", str(num_streams), "--kv-tokens", "65536")
    async with real_region(tmp_path, *workers, flags=flags) as region:
        answers: dict[int, list[wire.Event]] = {}

        async def ask(first: int) -> None:
            answers[first] = await region.answer(region.request(first, num_prompt=1 + first % 50))

        async with anyio.create_task_group() as tasks:
            for first in range(num_streams):
                tasks.start_soon(ask, first)
        for first, events in answers.items():
            assert ids(events) == counted(first, 40), events[-1]
            # Ids wrap at 256, so a prompt may begin as an earlier one did: in whole blocks of 16.
            (cached,) = [it.cached_tokens for it in events if isinstance(it, wire.Started)]
            assert cached in range(0, 1 + first % 50, 16)
            assert events[-1] == finish(1 + first % 50, 40, cached)
        for name in ("decode-0", "decode-1"):
            assert (await region.worker(name)).prompt_tokens_computed == 0
        await region.wait_idle(*workers)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["decode", "prefill"])
async def test_a_killed_worker_costs_no_token(tmp_path: Path, lost: str) -> None:
    workers = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    flags = ("--max-step-tokens", "64")
    async with real_region(tmp_path, *workers, step_s=0.02, flags=flags) as region:
        answers: dict[int, list[wire.Event]] = {}

        async def ask(first: int) -> None:
            asked = region.request(first, num_prompt=200, num_tokens=60)
            answers[first] = await region.answer(asked)

        async with anyio.create_task_group() as tasks:
            for first in range(20):
                tasks.start_soon(ask, first)
            await wait_busy(region, f"{lost}-0")
            region.signal(f"{lost}-0", signal.SIGKILL)
        for first, events in answers.items():
            assert ids(events) == counted(first, 60), events[-1]
            assert events[-1] == finish(200, 60)
        await region.wait_idle(*(name for name in workers if name != f"{lost}-0"))
        assert f"{lost}-0" not in {it.name for it in (await region.report()).processes}


@pytest.mark.slow
async def test_a_worker_that_stops_without_a_word_is_given_up(tmp_path: Path) -> None:
    async with real_region(tmp_path, "prefill-0", "decode-0", "decode-1", step_s=0.02) as region:
        answers: dict[int, list[wire.Event]] = {}

        async def ask(first: int) -> None:
            answers[first] = await region.answer(region.request(first, num_tokens=60))

        async with anyio.create_task_group() as tasks:
            for first in range(4):
                tasks.start_soon(ask, first)
            await wait_busy(region, "decode-0")
            region.signal("decode-0", signal.SIGSTOP)
        for first, events in answers.items():
            assert ids(events) == counted(first, 60), events[-1]
        region.signal("decode-0", signal.SIGCONT)
        await region.wait_idle("prefill-0", "decode-0", "decode-1")
        await region.wait_ready(3)  # and it is taken back


async def test_hanging_up_frees_every_block_at_every_stage(tmp_path: Path) -> None:
    workers = ("prefill-0", "decode-0")
    flags = ("--max-step-tokens", "64")
    async with real_region(tmp_path, *workers, step_s=0.01, flags=flags) as region:
        for patience_s in (0.0, 0.02, 0.1, 0.2, 0.4):  # 8 chunks of prompt, hand-over, decode
            asked = region.request(1, num_prompt=512, num_tokens=200)
            with anyio.move_on_after(patience_s):
                await region.answer(asked)
            await region.wait_idle(*workers)
        report = await region.report()
        assert {it.name: it.in_flight for it in report.processes}["front"] == 0


async def test_a_request_whose_time_is_up_leaves_nothing(tmp_path: Path) -> None:
    async with real_region(tmp_path, "prefill-0", "decode-0", step_s=0.02) as region:
        asked: Any = msgspec.structs.replace(region.request(1, num_tokens=1000), budget_s=0.5)
        last = (await region.answer(asked))[-1]
        assert isinstance(last, wire.Fault)
        assert last.code is Code.TIMEOUT
        await region.wait_idle("prefill-0", "decode-0")


async def wait_busy(region: RealRegion, name: str) -> None:
    with anyio.fail_after(60):
        while (await region.worker(name)).in_flight == 0:
            await anyio.sleep(0.01)
