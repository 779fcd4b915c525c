"""Requests at random times, as many as a region can answer and three times as many, in turn.

Two fleets side by side, which differ in one thing: whether the front bounds its line by the time
that it takes. Edge, front, worker and scheduler are the real ones; the runner of each engine sleeps
for as long as a step would take, so that capacity is known and the machine is not the limit.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter

import anyio
import httpx2

from loadtest.bench.client import Target, client
from loadtest.bench.fleets import edge_of, first_answer, processes, sleeping_engine
from loadtest.bench.host_clock import shared_tally
from loadtest.bench.host_model import make_model
from loadtest.bench.streams import BrokenStream, StreamReader
from routing.fleetfile import EdgeRow, FleetFile, FleetRow, RegionRow, WorkerRow
from routing.keys import create_key

MODEL, ACCOUNT = "@cf/bench/sleeping", "bench"
PROMPT = "Tell me all that you know of crowds"
LOADS = (1.0, 3.0)  # of what the region can answer
KINDS = {"bounded": (), "unbounded": ("--max-wait-s", "0")}  # flags of the front


class Broken(Exception):
    """An answer that was neither whole nor refused as it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    rows: int  # that the worker computes at a time
    step_s: float
    output_tokens: int  # of each answer
    window_s: float  # for which requests come
    rounds: int

    @property
    def answer_s(self) -> float:
        return self.output_tokens * self.step_s

    @property
    def capacity(self) -> float:
        """Requests a second, if nothing but steps took time."""
        return self.rows / self.answer_s


@dataclass(slots=True, kw_only=True)
class Window:
    """What became of the requests of one window; seconds."""

    kind: str
    load: float
    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Fleet:
    kind: str
    http: httpx2.AsyncClient
    url: str


async def measure(setting: Setting, environ: Mapping[str, str]) -> list[Window]:
    """Every window, in the order in which they were. Raises Broken."""
    windows = []
    async with AsyncExitStack() as running:
        at = Path(running.enter_context(TemporaryDirectory(prefix="edgefire-overload-")))
        fleets = [
            await running.enter_async_context(_fleet(kind, setting, at / kind, environ))
            for kind in KINDS
        ]
        for number in range(setting.rounds):
            for load in LOADS:
                for fleet in fleets if number % 2 else reversed(fleets):
                    windows.append(await _window(fleet, setting, load, Random(number)))
                    print(f"round {number + 1}: {fleet.kind}, {load:g} x", file=sys.stderr)
    return windows


async def _window(fleet: _Fleet, setting: Setting, load: float, random: Random) -> Window:
    """Until the last of its requests has ended. The same requests for every fleet."""
    window = Window(kind=fleet.kind, load=load)
    async with anyio.create_task_group() as tasks:
        begin = anyio.current_time()
        at = random.expovariate(load * setting.capacity)
        while at < setting.window_s:
            await anyio.sleep_until(begin + at)
            tasks.start_soon(_ask, fleet, setting, window)
            at += random.expovariate(load * setting.capacity)
    return window


async def _ask(fleet: _Fleet, setting: Setting, window: Window) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": setting.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = perf_counter()
    async with fleet.http.stream("POST", f"{fleet.url}/chat/completions", json=body) as answer:
        if answer.status_code == httpx2.codes.TOO_MANY_REQUESTS:
            said = await answer.aread()
            window.refused_s.append(perf_counter() - sent)
            if b"3040" not in said or int(answer.headers["retry-after"]) < 1:
                raise Broken(said.decode(errors="replace"))
            return
        if answer.status_code != httpx2.codes.OK:
            raise Broken((await answer.aread()).decode(errors="replace"))
        reader = StreamReader(sent)
        async for chunk in answer.aiter_raw():
            reader.feed(chunk, perf_counter())
    try:
        answered = reader.end(perf_counter())
    except BrokenStream as exc:
        raise Broken(str(exc)) from exc
    if answered.completion_tokens != setting.output_tokens:
        raise Broken(f"{answered.completion_tokens} tokens of {setting.output_tokens}")
    window.ttft_s.append(answered.ttft_s)
    window.total_s.append(answered.ended - answered.sent)


@asynccontextmanager
async def _fleet(
    kind: str, setting: Setting, folder: Path, environ: Mapping[str, str]
) -> AsyncGenerator[_Fleet, None]:
    flags = sleeping_engine(setting.step_s, folder / "tally") | {"front": KINDS[kind]}
    model_dir = make_model(folder / "model")
    with shared_tally(folder / "tally"):
        async with processes(
            _fleet_file(setting), folder / "fleet", environ, model_dir=model_dir, flags=flags
        ) as children:
            key = create_key(folder / "fleet" / "keys", environ, ACCOUNT)
            url = f"{edge_of(children)}/client/v4/accounts/{ACCOUNT}/ai/v1"
            async with client(Target(url=url, model=MODEL, token=key)) as asking:
                await first_answer(asking)
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            headers = {"authorization": f"Bearer {key}"}
            async with httpx2.AsyncClient(
                headers=headers, limits=limits, timeout=600.0, trust_env=False
            ) as http:
                yield _Fleet(kind, http, url)


def _fleet_file(setting: Setting) -> FleetFile:
    longest = len(PROMPT) + setting.output_tokens + 64  # the template's own ids, a block's end
    worker = WorkerRow(role="both", kv_tokens=2 * setting.rows * longest, max_running=setting.rows)
    return FleetFile(
        fleet=FleetRow(model=MODEL),
        edge=EdgeRow(port=0),
        regions=(RegionRow(name="weur", workers=(worker,)),),
    )
