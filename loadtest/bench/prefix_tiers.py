"""`python -m loadtest.bench.prefix_tiers --model-dir DIR`: what tiers of a prefix cache are worth.

Conversations of several turns, one turn of each after the other, with an engine in this process
whose KV holds a part of them. Every prompt is what was said before and a new question. Of each kind
of cache: how much of the prompts was found, and how long a turn took to its first token. The last
kind begins with what the one before has left on disk, as after a restart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import typer

from infire.__main__ import default_cache
from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.loaded import Loaded
from infire.native.load import load_native
from infire.request import SamplingParams, Sequence
from infire.scheduler import Scheduler
from infire.tier_files import make_tiers
from loadtest.bench.processor import machine
from loadtest.bench.table import markdown, number

NONE, DEVICE, HOST, DISK = "none", "device", "device and memory", "device, memory and files"
RESTART = "device and files, after a restart"
FIRST_ID, LAST_ID = 1000, 40_000
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Who says how much."""

    sessions: int
    turns: int
    system_tokens: int = 96  # the same for all
    question_tokens: int = 64
    answer_tokens: int = 24
    seed: int = 1


@dataclass(slots=True)
class Found:
    """What came of one kind of cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_s: list[float] = field(default_factory=list)


def play(engine: Engine, trace: Trace) -> Found:
    """All turns of all conversations, in turn."""
    rng, found = random.Random(trace.seed), Found()

    def some(count: int) -> list[int]:
        return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(count)]

    system = some(trace.system_tokens)
    said = [list(system) for _ in range(trace.sessions)]
    for turn in range(trace.turns):
        for n, ids in enumerate(said):
            ids += some(trace.question_tokens)
            sequence = Sequence(
                request_id=f"{turn}-{n}",
                model="bench",
                token_ids=list(ids),
                num_prompt=len(ids),
                sampling=SamplingParams(
                    max_tokens=trace.answer_tokens, seed=n, temperature=0.0, speculate=False
                ),
            )
            found.prompt_tokens += len(ids)
            ids += _answer(engine, sequence, found)
    while engine.rest():  # as an engine does between requests
        pass
    return found


def _answer(engine: Engine, sequence: Sequence, found: Found) -> list[int]:
    began, ids = perf_counter(), list[int]()
    engine.submit(sequence)
    while results := engine.step():
        for step in results.steps:
            if not ids:
                found.first_s.append(perf_counter() - began)
                found.cached_tokens += step.cached_tokens
            ids += step.ids
    return ids


def engines(model: Loaded, folder: Path) -> Iterator[tuple[str, Engine]]:
    """One of each kind, over the same model: the next is made when the last is done with."""
    kinds: Mapping[str, tuple[bool, int, Path | None]] = {
        NONE: (False, 0, None),
        DEVICE: (True, 0, None),
        HOST: (True, 1 << 30, None),
        DISK: (True, 1 << 24, folder),
        RESTART: (True, 0, folder),
    }
    for name, (prefix_cache, host_bytes, files) in kinds.items():
        limits = Limits(
            max_step_tokens=512,
            max_running=4,
            context_window=model.context_window,
            vocab_size=model.vocab_size,
            prefix_cache=prefix_cache,
        )
        layout = model.layout
        tiers = make_tiers(layout, host_bytes=host_bytes, folder=files, disk_bytes=8 << 30)
        pools = [BlockPool(count) for count in model.num_blocks]
        model.runner.tags.reset()  # type: ignore[attr-defined]  # as with a new engine
        scheduler = Scheduler(
            pools, layout.groups, limits, model_digest=layout.model_digest, tier=tiers
        )
        engine = Engine(scheduler, model.runner, tiers=tiers)
        yield name, engine
        engine.close()


@app.command(help=__doc__)
def run(  # noqa: PLR0913  one parameter a flag
    *,
    model_dir: Annotated[Path, typer.Option(help="Made by `fleet pull`.", file_okay=False)],
    sessions: Annotated[int, typer.Option(min=1)] = 16,
    turns: Annotated[int, typer.Option(min=1)] = 5,
    kv_tokens: Annotated[int, typer.Option(min=1024, help="That the device has.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    cache_dir: Annotated[Path | None, typer.Option(help="Packed weights, kernels.")] = None,
) -> None:
    trace = Trace(sessions=sessions, turns=turns)
    model = load_native(
        model_dir,
        cache=cache_dir or default_cache({}),
        weights="u12",
        kv_tokens=kv_tokens,
        block_tokens=16,
        max_running=4,
        max_step_tokens=512,
        threads=threads,
    )
    seen: dict[str, Found] = {}
    for _ in range(rounds):
        with TemporaryDirectory(prefix="edgefire-bench-") as at:
            for name, engine in engines(model, Path(at)):
                found = play(engine, trace)
                kept = seen.setdefault(name, Found())
                kept.prompt_tokens += found.prompt_tokens
                kept.cached_tokens += found.cached_tokens
                kept.first_s += found.first_s
    rows = [
        [
            name,
            f"{it.prompt_tokens // rounds:,}",
            f"{100 * it.cached_tokens / it.prompt_tokens:.1f} %",
            f"{(it.prompt_tokens - it.cached_tokens) // rounds:,}",
            number(1000 * median(it.first_s)),
            f"{number(1000 * min(it.first_s))} to {number(1000 * max(it.first_s))}",
            str(len(it.first_s)),
        ]
        for name, it in seen.items()
    ]
    heads = ["cache", "prompt tokens", "found", "computed", "first token, ms", "least, most", "n"]
    typer.echo(markdown(heads, rows))
    longest = trace.system_tokens + turns * (trace.question_tokens + trace.answer_tokens)
    typer.echo(
        f"{machine()}; {sessions} conversations of {turns} turns, {longest} tokens in the end, "
        f"KV of {kv_tokens:,} tokens on the device; {rounds} rounds in turn."
    )


if __name__ == "__main__":
    app()
