"""Fleets of real processes on this machine, with the small model, for the length of a block."""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from loadtest.bench.client import Client, Target, client
from loadtest.bench.streams import BrokenStream
from routing.catalogue import load_catalogue
from routing.children import Children
from routing.fleetfile import EdgeRow, FleetFile, FleetRow, RegionRow, WorkerRow
from routing.keys import create_key
from routing.layout import Ground, lay_out
from routing.paths import paths
from routing.pull import pull_model

MODEL, ACCOUNT = "@cf/huggingfacetb/smollm2-135m-instruct", "bench"
READY_S = 120.0


@asynccontextmanager
async def processes(
    file: FleetFile,
    folder: Path,
    environ: Mapping[str, str],
    *,
    model_dir: Path,
    flags: Mapping[str, Sequence[str]],
) -> AsyncGenerator[Children, None]:
    """All processes of a layout, ready; stopped when the block is left.

    `folder` is theirs, and made if need be; `flags`: more words of their commands, by role.
    """
    (folder / "logs").mkdir(parents=True)
    (folder / "secret").touch(mode=0o600)
    (folder / "secret").write_text("of one run on loopback")
    ground = Ground(
        folder=folder,
        keys_dir=folder / "keys",
        cache_dir=folder / "cache",
        usage_dir=folder / "usage",
        model_dir=model_dir,
        device="cpu",
        cores=1,
        say=lambda line: print(line, file=sys.stderr),
    )
    commands = [
        replace(it, words=(*it.words, *flags.get(it.role, ()))) for it in lay_out(file, ground)
    ]
    children = Children(commands, environ, say=ground.say)
    try:
        await children.start()
        await children.wait_ready(lambda name: None, within_s=READY_S)
        yield children
    finally:
        await children.stop()
        for command in commands:
            command.listener.close()


def edge_of(children: Children) -> str:
    """The address of the first edge."""
    return next(child.command.url for child in children if child.command.role == "edge")


def sleeping_engine(step_s: float, tally: Path) -> dict[str, Sequence[str]]:
    """Flags of workers whose engines sleep a step's time, and count in the file `tally`."""
    words = [sys.executable, "-m", "loadtest.bench.host_engine"]
    words += ["--step-s", str(step_s), "--tally", str(tally)]
    return {"both": ("--engine-command", shlex.join(words))}


@asynccontextmanager
async def fleet(
    rows: Sequence[WorkerRow], environ: Mapping[str, str], *, local_tokens: int
) -> AsyncGenerator[Client, None]:
    """A fleet of one region with these workers, ready; gone when the block is left."""
    model_dir = pull_model(load_catalogue(None).row(MODEL), paths(environ).cache)
    region = RegionRow(name="weur", workers=tuple(rows))
    file = FleetFile(fleet=FleetRow(model=MODEL), edge=EdgeRow(port=0), regions=(region,))
    flags = {"front": ("--local-tokens", str(local_tokens))}
    with TemporaryDirectory(prefix="edgefire-bench-") as at:
        folder = Path(at) / "fleet"
        async with processes(file, folder, environ, model_dir=model_dir, flags=flags) as children:
            key = create_key(folder / "keys", environ, ACCOUNT)
            url = f"{edge_of(children)}/client/v4/accounts/{ACCOUNT}/ai/v1"
            target = Target(url=url, model=MODEL, token=key, extra={"ignore_eos": True})
            async with client(target) as asking:
                await first_answer(asking)
                yield asking


async def first_answer(asking: Client) -> None:
    """Ready processes need not know of each other yet."""
    with anyio.fail_after(READY_S):
        while True:
            try:
                await asking.ask("Hello", 1)
            except BrokenStream:
                await anyio.sleep(0.1)
            else:
                return
