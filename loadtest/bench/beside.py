"""Streams that are answered while other prompts come: what these cost those. Knows no command."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from statistics import median

import anyio

from loadtest.bench.client import Client
from loadtest.bench.fleets import fleet
from loadtest.bench.measure import Prompts, fit
from loadtest.bench.streams import Answered
from loadtest.bench.table import markdown, number, spread
from loadtest.report import percentile
from routing.fleetfile import WorkerRow

SPLIT, TOGETHER = "prefill + decode", "both + both"
HANDED, LOCAL = "handed over", "computed there"
NEVER, ALWAYS = 0, 1 << 20  # prompt tokens that a decode worker computes itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked in one measurement."""

    num_streams: int
    output_tokens: int  # of each stream
    prompt_tokens: int  # of the prompts beside them
    prompt_output: int = 1  # and of what is answered to those


@dataclass(slots=True)
class Seen:
    """What came of one setting, all rounds together."""

    gaps_s: list[float] = field(default_factory=list)  # of the streams
    worst_s: list[float] = field(default_factory=list)  # of each round, the longest of them
    medians_s: list[float] = field(default_factory=list)  # of each round
    answers: list[Answered] = field(default_factory=list)  # to the prompts beside them


Table = dict[tuple[str, int], Seen]  # by fleet, and by tokens of the prompts beside (0: none)


async def measure(load: Load, rounds: int, environ: Mapping[str, str]) -> Table:
    """Both fleets, quiet and beside long prompts."""
    seen: Table = {}
    workers = {
        SPLIT: (WorkerRow(role="prefill", threads=1), WorkerRow(role="decode", threads=1)),
        TOGETHER: (WorkerRow(role="both", threads=1, count=2),),
    }
    async with AsyncExitStack() as stack:
        asking = {
            name: await stack.enter_async_context(fleet(rows, environ, local_tokens=NEVER))
            for name, rows in workers.items()
        }
        prompts = {name: await fit(it, 0) for name, it in asking.items()}
        for turn in range(-1, rounds):  # the first warms up
            for name in sorted(asking, reverse=bool(turn % 2)):
                for beside in (0, load.prompt_tokens):
                    loaded = replace(load, prompt_tokens=beside)
                    found = await once(asking[name], prompts[name], loaded)
                    if turn >= 0:
                        keep(seen.setdefault((name, beside), Seen()), found)
    return seen


async def measure_short(load: Load, rounds: int, environ: Mapping[str, str]) -> Table:
    """One fleet whose front hands everything over, and one whose front hands over nothing."""
    seen: Table = {}
    rows = (WorkerRow(role="prefill", threads=1), WorkerRow(role="decode", threads=1))
    async with AsyncExitStack() as stack:
        asking = {
            name: await stack.enter_async_context(fleet(rows, environ, local_tokens=local_tokens))
            for name, local_tokens in ((HANDED, NEVER), (LOCAL, ALWAYS))
        }
        prompts = {name: await fit(it, 0) for name, it in asking.items()}
        for turn in range(-1, rounds):
            for num_tokens in (40, 48, 64, 96, 128, 256, 512):
                for name in sorted(asking, reverse=bool(turn % 2)):
                    loaded = replace(load, prompt_tokens=num_tokens, prompt_output=2)
                    found = await once(asking[name], prompts[name], loaded)
                    if turn >= 0:
                        keep(seen.setdefault((name, num_tokens), Seen()), found)
    return seen


Once = tuple[list[Answered], list[Answered]]  # the streams, and the answers to prompts beside them


async def once(asking: Client, prompts: Prompts, load: Load) -> Once:
    """Streams to their end, and beside them one prompt after the other."""
    streams: list[Answered] = []
    beside: list[Answered] = []

    async def stream() -> None:
        streams.append(await asking.ask(prompts.take(64), load.output_tokens))

    async def ask_beside() -> None:
        for _ in itertools.count():
            prompt = prompts.take(load.prompt_tokens)
            beside.append(await asking.ask(prompt, load.prompt_output))

    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as tasks:
            for _ in range(load.num_streams):
                tasks.start_soon(stream)
            if load.prompt_tokens:
                others.start_soon(ask_beside)
        others.cancel_scope.cancel()
    return streams, beside


def keep(seen: Seen, found: Once) -> None:
    """Gaps between all first texts and the first end: before and after, streams are not all."""
    streams, beside = found
    begin = max(it.texts[0] for it in streams)
    end = min(it.texts[-1] for it in streams)
    gaps = [
        after - before
        for it in streams
        for before, after in itertools.pairwise(it.texts)
        if begin <= before and after <= end
    ]
    seen.gaps_s += gaps
    seen.worst_s.append(max(gaps))
    seen.medians_s.append(median(gaps))
    seen.answers += beside


def table(seen: Table) -> str:
    heads = ["fleet", "beside", "gap p50", "p99", "longest", "longest of a round", "n"]
    heads += ["prompts", "their TTFT"]
    rows = []
    for (name, beside), it in seen.items():
        gaps = sorted(it.gaps_s)
        rows.append(
            [
                name,
                f"{beside:,} tokens" if beside else "nothing",
                *(_ms(percentile(gaps, share)) for share in (0.5, 0.99, 1.0)),
                spread([1000 * one for one in it.worst_s]),
                f"{len(gaps):,}",
                str(len(it.answers)),
                _ms(median(one.ttft_s for one in it.answers)) if it.answers else "",
            ]
        )
    return markdown(heads, rows)


def short_table(seen: Table) -> str:
    heads = ["prompt tokens", "way", "its TTFT", "its second token", "others' gap p50", "p99"]
    heads += ["longest of a round", "prompts"]
    rows = []
    for (name, beside), it in sorted(seen.items(), key=lambda pair: (pair[0][1], pair[0][0])):
        gaps = sorted(it.gaps_s)
        whole = [one for one in it.answers if len(one.texts) > 1]
        rows.append(
            [
                str(beside),
                name,
                _ms(median(one.ttft_s for one in it.answers)),
                _ms(median(one.texts[1] - one.sent for one in whole)),
                *(_ms(percentile(gaps, share)) for share in (0.5, 0.99)),
                spread([1000 * one for one in it.worst_s]),
                str(len(it.answers)),
            ]
        )
    return markdown(heads, rows)


def _ms(seconds: float) -> str:
    return number(1000 * seconds)
