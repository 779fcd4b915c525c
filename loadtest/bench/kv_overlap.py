"""`python -m loadtest.bench.kv_overlap`: what it saves to hand KV over while it is computed.

A prefill worker and a decode worker with the small model, and this process as their front. Of each
long prompt the time counts from the first token, which the one makes, to the second, which the
other makes: the hand-over is in between. In turn, KV is collected once all of it is there, or from
the first piece on; over TCP, and by sharing a file.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import anyio
import typer

from loadtest.bench.client import wait_ready
from loadtest.bench.fleets import MODEL, READY_S
from loadtest.bench.processor import machine
from loadtest.bench.servers import free_port, running
from loadtest.bench.table import markdown, spread
from origin_gpu.handover import (
    Computing,
    Fetch,
    Peer,
    Prefill,
    Prefilled,
    Resume,
    Watch,
    Watched,
    WorkerEvent,
)
from origin_gpu.models import read_assets
from routing import wire
from routing.link import Link
from routing.secret import make_secret

WHOLE, AHEAD = "when all is there", "as it is computed"
FIRST_ID = 1000  # below it many tokenizers keep tokens of their own use
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Pair:
    """Both workers, as their front has them."""

    def __init__(
        self, prefill: Link[WorkerEvent], decode: Link[WorkerEvent], tokenizer_digest: str
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._digest = tokenizer_digest
        self._numbers = count()

    async def ask(self, num_prompt: int, *, ahead: bool) -> tuple[float, float]:
        """Seconds from a new prompt to its first token, and from that to the second."""
        number = next(self._numbers)
        request = wire.Generate(
            request_id=f"bench-{number}",
            tenant_salt=number.to_bytes(8, "little"),  # so that nothing of it is cached
            model=MODEL,
            tokenizer_digest=self._digest,
            token_ids=tuple(FIRST_ID + at for at in range(num_prompt)),
            sampling=wire.Sampling(max_tokens=2, seed=0, temperature=0.0),
            budget_s=READY_S,
        )
        began = perf_counter()
        async with AsyncExitStack() as stack:
            events = await stack.enter_async_context(self._prefill.open(Prefill(request)))
            async for event in events:
                if isinstance(event, Computing) and ahead:
                    await stack.enter_async_context(self._decode.open(Fetch(event.ticket)))
                elif isinstance(event, Prefilled):
                    first = perf_counter()
                    rest = await stack.enter_async_context(
                        self._decode.open(Resume(request, event))
                    )
                    await _tokens(rest)
                    return first - began, perf_counter() - first
                elif not isinstance(event, Computing):
                    raise RuntimeError(str(event))
        raise RuntimeError("the prefill ended without an answer")


async def _tokens(events: AsyncIterator[WorkerEvent]) -> None:
    async for event in events:
        if isinstance(event, wire.Tokens):
            return
    raise RuntimeError("the decode worker said nothing")


@asynccontextmanager
async def pair(model_dir: Path, ways: str, folder: Path) -> AsyncGenerator[Pair, None]:
    """Two workers with one thread each, that know each other."""
    secret = make_secret(folder / "secret")
    async with AsyncExitStack() as stack:
        urls: dict[str, str] = {}
        for role in ("prefill", "decode"):
            port = free_port()
            urls[role] = f"http://127.0.0.1:{port}"
            words = [sys.executable, "-m", "origin_gpu", "worker", "--name", role]
            words += ["--region", "bench", "--role", role, "--model", MODEL, "--device", "cpu"]
            words += ["--model-dir", str(model_dir), "--secret-file", str(folder / "secret")]
            words += ["--port", str(port), "--threads", "1", "--kv-ways", ways]
            await stack.enter_async_context(running(words, folder / f"{ways}-{role}.log"))
        for url in urls.values():
            await wait_ready(f"{url}/ready", READY_S)
        tasks = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(tasks.cancel_scope.cancel)
        links = {role: Link[WorkerEvent](url, secret, WorkerEvent) for role, url in urls.items()}
        for link in links.values():
            tasks.start_soon(link.run)
            await link.wait_connected()
        watch = await stack.enter_async_context(links["prefill"].open(Watch(())))
        watched = await anext(watch)
        assert isinstance(watched, Watched)
        giver = Peer(
            name="prefill", role="prefill", url=urls["prefill"], kv_address=watched.kv_address
        )
        await stack.enter_async_context(links["decode"].open(Watch((giver,))))
        yield Pair(links["prefill"], links["decode"], read_assets(model_dir).digest)


Times = dict[tuple[str, str], list[tuple[float, float]]]  # by way, and by when


async def measure(model_dir: Path, num_prompt: int, rounds: int) -> Times:
    times: Times = {}
    with TemporaryDirectory(prefix="edgefire-bench-") as at:
        async with AsyncExitStack() as stack:
            pairs = {
                ways: await stack.enter_async_context(pair(model_dir, ways, Path(at)))
                for ways in ("tcp", "shared")
            }
            for turn in range(-1, rounds):  # the first warms up
                for ways, both in pairs.items():
                    for when in sorted((WHOLE, AHEAD), reverse=bool(turn % 2)):
                        took = await both.ask(num_prompt, ahead=when == AHEAD)
                        if turn >= 0:
                            times.setdefault((ways, when), []).append(took)
    return times


def table(times: Times) -> str:
    heads = ["way", "KV is collected", "first token, ms", "first to second token, ms", "n"]
    rows = [
        [way, when, *(spread([1000 * it[n] for it in found]) for n in (0, 1)), str(len(found))]
        for (way, when), found in sorted(times.items(), reverse=True)
    ]
    return markdown(heads, rows)


@app.command(help=__doc__)
def run(
    *,
    model_dir: Annotated[Path, typer.Option(help="Made by `fleet pull`.", file_okay=False)],
    prompt_tokens: Annotated[int, typer.Option(min=513)] = 2000,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
) -> None:
    times = anyio.run(measure, model_dir, prompt_tokens, rounds)
    typer.echo(table(times))
    typer.echo(f"{machine()}; {prompt_tokens:,} tokens; median, least and most, in turn.")


if __name__ == "__main__":
    app()
