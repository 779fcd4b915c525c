"""`python -m loadtest.bench.formats --model-dir FOLDER`: a decode step in 12 bits beside BF16.

Two runners of one process take turns, some steps each, on the same prompts: whatever else the
machine does meets both. No HTTP, no scheduler. Of each turn the median of its steps counts, but for
the first few, which find the other's weights in the cache.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import typer

from infire.native.load import load_native
from infire.plan import Row, Runner, SlotOpen, StepPlan
from infire.request import SamplingParams
from loadtest.bench.processor import machine
from loadtest.bench.serve import counts
from loadtest.bench.table import markdown, number

FORMATS = ("u12", "bf16")
PROMPT_TOKENS = 128
BLOCK_TOKENS = 16
TURN_STEPS = 25
UNCOUNTED_STEPS = 4  # of a turn

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Turns:
    """Of one batch: seconds of a step in each turn, and whether both said the same."""

    batch: int
    seconds: Mapping[str, list[float]]
    same_ids: bool

    def ratios(self) -> list[float]:
        """BF16's time over that of 12 bits, turn by turn."""
        return [b / a for a, b in zip(*(self.seconds[name] for name in FORMATS), strict=True)]


class Streams:
    """Sequences on one runner, a token further with each step."""

    def __init__(self, runner: Runner, batch: int, num_steps: int, vocab_size: int) -> None:
        rng = random.Random(1)
        sampling = SamplingParams(max_tokens=num_steps + 1, seed=0, temperature=0.0)
        blocks = -(-(PROMPT_TOKENS + num_steps + 1) // BLOCK_TOKENS)
        opens, rows = [], []
        for slot in range(batch):
            ids = tuple(rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS))
            own = tuple(range(slot * blocks, (slot + 1) * blocks))
            opens.append(
                SlotOpen(slot=slot, token_ids=ids, num_prompt=PROMPT_TOKENS, sampling=sampling)
            )
            rows.append(Row(slot=slot, start=0, num_new=PROMPT_TOKENS, ids=ids, new_blocks=(own,)))
        self._runner = runner
        self._step = 0
        results = runner.run(StepPlan(step=0, opens=tuple(opens), rows=tuple(rows)))
        self.ids = [result.ids[0] for result in results]

    def step(self) -> float:
        """Seconds that it took."""
        start = PROMPT_TOKENS + self._step
        self._step += 1
        rows = tuple(
            Row(slot=slot, start=start, num_new=1, ids=(id_,), new_blocks=((),))
            for slot, id_ in enumerate(self.ids)
        )
        began = perf_counter()
        results = self._runner.run(StepPlan(step=self._step, opens=(), rows=rows))
        took = perf_counter() - began
        self.ids = [result.ids[0] for result in results]
        return took


@app.command(help=__doc__)
def run(
    *,
    model_dir: Annotated[Path, typer.Option(exists=True, help="Made by `infire pull`.")],
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8,32",
    turns: Annotated[int, typer.Option(min=2, help="Of each.")] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    with TemporaryDirectory() as cache:
        found = [
            measure(model_dir, batch, turns, threads, Path(cache)) for batch in counts(batches)
        ]
    typer.echo(table(found))
    typer.echo(f"{machine()}; {threads} threads; {turns} turns of {TURN_STEPS} steps of each.")


def measure(model_dir: Path, batch: int, turns: int, threads: int, cache: Path) -> Turns:
    """Kernels and packed weights go to `cache`. Raises `BadModel`, `CannotBuild`."""
    num_steps = turns * TURN_STEPS
    tokens = batch * (PROMPT_TOKENS + num_steps + 2 * BLOCK_TOKENS)
    streams = {}
    for name in FORMATS:
        loaded = load_native(
            model_dir, cache=cache, weights=name, kv_tokens=tokens, block_tokens=BLOCK_TOKENS,
            max_running=batch, max_step_tokens=batch * PROMPT_TOKENS, threads=threads,
        )  # fmt: skip
        streams[name] = Streams(loaded.runner, batch, num_steps, loaded.vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    for turn in range(turns):
        for name in FORMATS[:: 1 if turn % 2 else -1]:
            steps = [streams[name].step() for _ in range(TURN_STEPS)]
            seconds[name].append(median(steps[UNCOUNTED_STEPS:]))
    first, second = (streams[name].ids for name in FORMATS)
    return Turns(batch, seconds, first == second)


def table(found: list[Turns]) -> str:
    """A line a batch."""
    lines = []
    for turns in found:
        ratios = turns.ratios()
        times = [number(median(turns.seconds[name]) * 1e3) for name in FORMATS]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        same = "yes" if turns.same_ids else "no"
        lines.append([str(turns.batch), *times, f"{median(ratios):.2f}x", spread, same])
    return markdown(
        ["streams", "12 bits, ms", "BF16, ms", "ratio", "in all turns", "same ids"], lines
    )


if __name__ == "__main__":
    app()
