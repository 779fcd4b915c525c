"""What serving costs the host, in CPU seconds a million tokens: one run of it.

Edge, front, worker and engine are the real processes, as `fleet up` lays them out; but the runner
of the engine sleeps, as long as a GPU would compute. Clients are a process of their own, which is
not counted. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import anyio
import msgspec
from anyio.abc import Process

from loadtest.bench.fleets import processes, sleeping_engine
from loadtest.bench.host_clock import Tally, cpu_s, shared_tally, wakeups
from loadtest.bench.host_load import Load, Outcome
from loadtest.bench.host_model import make_model
from loadtest.bench.host_report import Reading, Run, shares
from routing.children import Children
from routing.fleetfile import EdgeRow, FleetFile, FleetRow, RegionRow, WorkerRow
from routing.keys import create_key

MODEL, ACCOUNT = "@cf/bench/sleeping", "bench"
PROMPT = "Tell me all that you know of sleep"  # an id a byte
WARM_S, STOP_S = 300.0, 30.0
_LOOK_S = 0.2

Api = Literal["native", "openai"]


class Broken(Exception):
    """The measurement is worth nothing, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What one run measures."""

    num_streams: int
    step_s: float
    output_tokens: int  # of an answer
    api: Api
    num_windows: int
    window_s: float


async def measure(setting: Setting, environ: Mapping[str, str]) -> Run:
    """Start everything, wait until all streams are at it, read the clocks, stop everything.

    Raises Broken when any answer was not what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="edgefire-host-") as at:
        folder = Path(at)
        with shared_tally(folder / "tally") as tally:
            async with processes(
                _fleet_file(setting),
                folder / "fleet",
                environ,
                model_dir=make_model(folder / "model"),
                flags=sleeping_engine(setting.step_s, folder / "tally"),
            ) as children:
                edge, pids = _addresses(children)
                key = create_key(folder / "fleet" / "keys", environ, ACCOUNT)
                load = _load(setting, edge, key)
                async with _clients(load, environ) as clients:
                    await _warm(setting, tally, clients)
                    readings = [_read(tally, pids)]
                    for _ in range(setting.num_windows):
                        await anyio.sleep(setting.window_s)
                        readings.append(_read(tally, pids))
                    outcome = await _stop(clients)
    return Run(
        num_streams=setting.num_streams,
        step_s=setting.step_s,
        windows=[shares(*pair) for pair in pairwise(readings)],
        tokens_per_event=outcome.tokens / outcome.events,
    )


def _fleet_file(setting: Setting) -> FleetFile:
    """Room for every stream in every step, and for two prompts beside them."""
    longest = len(PROMPT) + setting.output_tokens + 64  # the template's own ids, a block's end
    worker = WorkerRow(
        role="both",
        kv_tokens=2 * setting.num_streams * longest,
        max_step_tokens=setting.num_streams + 512,
        max_running=setting.num_streams,
        max_waiting=2 * setting.num_streams,
    )
    return FleetFile(
        fleet=FleetRow(model=MODEL),
        edge=EdgeRow(port=0),
        regions=(RegionRow(name="weur", workers=(worker,)),),
    )


def _addresses(children: Children) -> tuple[str, dict[str, int]]:
    """The edge's URL, and process ids by role."""
    by_role = {child.command.role: child for child in children}
    pids = {str(role): child.process.pid for role, child in by_role.items()}
    return by_role["edge"].command.url, pids


def _load(setting: Setting, edge: str, key: str) -> Load:
    host, port = edge.removeprefix("http://").split(":")
    root = f"/client/v4/accounts/{ACCOUNT}/ai"
    told: dict[str, object] = {"stream": True}
    if setting.api == "native":
        path = f"{root}/run/{MODEL}"
        told |= {"prompt": PROMPT}
    else:
        path = f"{root}/v1/chat/completions"
        told |= {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
        told |= {"stream_options": {"include_usage": True}}
    return Load(
        host=host,
        port=int(port),
        path=path,
        key=key,
        body=told,
        num_streams=setting.num_streams,
        output_tokens=setting.output_tokens,
    )


@asynccontextmanager
async def _clients(load: Load, environ: Mapping[str, str]) -> AsyncGenerator[Process, None]:
    """The load generator, asking already; it is gone when the block is left."""
    command = [sys.executable, "-m", "loadtest.bench.host_load"]
    clients = await anyio.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, env=environ
    )
    try:
        assert clients.stdin is not None
        await clients.stdin.send(msgspec.json.encode(load) + b"\n")
        yield clients
    finally:
        with anyio.CancelScope(shield=True):
            if clients.returncode is None:
                clients.kill()
            await clients.aclose()


async def _warm(setting: Setting, tally: Tally, clients: Process) -> None:
    """Until every stream is past its first answer, which may be of any length."""
    wanted = setting.num_streams * setting.output_tokens
    deadline = time.monotonic() + WARM_S
    while (made := tally.read()[2]) < wanted and clients.returncode is None:
        if time.monotonic() > deadline:
            raise Broken(f"{made} of {wanted} tokens in the first {WARM_S:g} s")
        await anyio.sleep(_LOOK_S)


def _read(tally: Tally, pids: Mapping[str, int]) -> Reading:
    engine, scheduler_ns, tokens = tally.read()
    if not engine:
        raise Broken("the engine has made no step")
    return Reading(
        at_s=time.monotonic(),
        tokens=tokens,
        scheduler_s=scheduler_ns / 1e9,
        engine_s=cpu_s(engine),
        worker_s=cpu_s(pids["both"]),
        front_s=cpu_s(pids["front"]),
        edge_s=cpu_s(pids["edge"]),
        wakeups={
            "engine": wakeups(engine),
            "worker": wakeups(pids["both"]),
            "front": wakeups(pids["front"]),
            "edge": wakeups(pids["edge"]),
        },
    )


async def _stop(clients: Process) -> Outcome:
    """Have the clients stop, and say how they fared. Raises Broken when not well."""
    assert clients.stdin is not None
    assert clients.stdout is not None
    await clients.stdin.aclose()
    with anyio.fail_after(STOP_S):
        told = b"".join([part async for part in clients.stdout])
    outcome = msgspec.json.decode(told, type=Outcome)
    if outcome.bad or not outcome.answers:
        raise Broken(f"after {outcome.answers} whole answers a client got: {outcome.bad}")
    return outcome
