"""Fleets of real processes on this machine, with the small model, for the length of a block."""

from __future__ import annotations

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
async def fleet(
    rows: Sequence[WorkerRow], environ: Mapping[str, str], *, local_tokens: int
) -> AsyncGenerator[Client, None]:
    """A fleet of one region with these workers, ready; gone when the block is left."""
    here = paths(environ)
    with TemporaryDirectory(prefix="edgefire-bench-") as at:
        folder = Path(at)
        (folder / "logs").mkdir()
        (folder / "secret").touch(mode=0o600)
        (folder / "secret").write_text("of one run on loopback")
        ground = Ground(
            folder=folder,
            keys_dir=folder / "keys",
            cache_dir=folder / "cache",
            usage_dir=folder / "usage",
            model_dir=pull_model(load_catalogue(None).row(MODEL), here.cache),
            device="cpu",
            cores=1,
            say=lambda line: print(line, file=sys.stderr),
        )
        region = RegionRow(name="weur", workers=tuple(rows))
        file = FleetFile(fleet=FleetRow(model=MODEL), edge=EdgeRow(port=0), regions=(region,))
        commands = [
            replace(it, words=(*it.words, "--local-tokens", str(local_tokens)))
            if it.role == "front"
            else it
            for it in lay_out(file, ground)
        ]
        children = Children(commands, environ, say=ground.say)
        try:
            await children.start()
            await children.wait_ready(lambda name: None, within_s=READY_S)
            edge = next(it.url for it in commands if it.role == "edge")
            key = create_key(folder / "keys", environ, ACCOUNT)
            url = f"{edge}/client/v4/accounts/{ACCOUNT}/ai/v1"
            target = Target(url=url, model=MODEL, token=key, extra={"ignore_eos": True})
            async with client(target) as asking:
                await first_answer(asking)
                yield asking
        finally:
            await children.stop()
            for command in commands:
                command.listener.close()


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
