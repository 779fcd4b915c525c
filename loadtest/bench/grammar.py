"""`python -m loadtest.bench.grammar --model-dir DIR`: what a grammar costs a step.

An engine in this process computes so many rows, in turn without a grammar and with one, round by
round: what a step takes then, and of that the masks by themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any

import typer

from infire.__main__ import default_cache
from infire.grammar import Templates
from infire.loaded import Loaded
from infire.masks import Masks
from infire.native.load import load_native
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import Grammar, SamplingParams
from loadtest.bench.processor import machine
from loadtest.bench.table import markdown, number

MOST_ROWS = 16
PROMPT = 32  # tokens
STEPS = 64  # of a part of a round, after the prompts
BLOCK = 16  # tokens
PARTS = ("no grammar", "JSON schema", "regex")
# Long enough for any part, and no id more forced than needed.
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["person", "place", "thing"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}
GRAMMARS = {
    "JSON schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "regex": Grammar("regex", r"([A-Z][a-z]{2,9} [0-9]{1,4}, ){100}"),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(slots=True)
class Times:
    """Of one part, in microseconds."""

    step: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)  # of a step, all rows


class Timed(Masks):
    """Masks that note how long they take."""

    def __init__(self, templates: Templates, num_slots: int, vocab_size: int) -> None:
        super().__init__(templates, num_slots, vocab_size)
        self.took_us = 0.0

    def fill(self, rows: Seq[Row]) -> None:
        began = perf_counter()
        super().fill(rows)
        self.took_us += 1e6 * (perf_counter() - began)

    def settle(self, rows: Seq[Row], results: list[RowResult]) -> list[RowResult]:
        began = perf_counter()
        settled = super().settle(rows, results)
        self.took_us += 1e6 * (perf_counter() - began)
        return settled


class Rows:
    """So many sequences, computed by the model's runner, a step after the other."""

    def __init__(self, model: Loaded, masks: Timed, count: int) -> None:
        self._runner, self._masks, self._count = model.runner, masks, count
        self._step = 0

    def play(self, grammar: Grammar | None, seed: int, into: Times) -> None:
        """The same prompts and numbers, whatever the grammar."""
        chance = random.Random(seed)
        prompts = [[chance.randrange(1000, 40_000) for _ in range(PROMPT)] for _ in self._slots]
        ids = self._run(self._opens(prompts, grammar), self._first(prompts), None)
        for n in range(STEPS):
            rows = [
                Row(slot=slot, start=PROMPT + n, num_new=1, ids=(ids[slot],))
                for slot in self._slots
            ]
            ids = self._run((), rows, into)

    @property
    def _slots(self) -> range:
        return range(self._count)

    def _opens(self, prompts: Seq[list[int]], grammar: Grammar | None) -> tuple[SlotOpen, ...]:
        return tuple(
            SlotOpen(
                slot=slot,
                token_ids=tuple(ids),
                num_prompt=PROMPT,
                sampling=SamplingParams(max_tokens=STEPS + 1, seed=slot, temperature=0.7),
                grammar=grammar,
            )
            for slot, ids in enumerate(prompts)
        )

    def _first(self, prompts: Seq[list[int]]) -> list[Row]:
        width = -(-(PROMPT + STEPS + 1) // BLOCK)
        return [
            Row(
                slot=slot,
                start=0,
                num_new=PROMPT,
                ids=tuple(ids),
                new_blocks=(tuple(range(slot * width, (slot + 1) * width)),),
            )
            for slot, ids in enumerate(prompts)
        ]

    def _run(self, opens: tuple[SlotOpen, ...], rows: list[Row], into: Times | None) -> list[int]:
        self._step += 1
        self._masks.took_us = 0.0
        began = perf_counter()
        results = self._runner.run(StepPlan(step=self._step, opens=opens, rows=tuple(rows)))
        if into is not None:
            into.step.append(1e6 * (perf_counter() - began))
            into.masks.append(self._masks.took_us)
        assert not any(result.fault or result.ended for result in results)
        return [result.ids[0] for result in results]


def said(values: Seq[float]) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return f"{number(median(values))} ({number(low)}-{number(high)})"


def compile_s(templates: Templates, grammar: Grammar, count: int = 9) -> list[float]:
    """Seconds that it takes to compile it anew, first mask included."""
    took = []
    for _ in range(count):
        template = templates.get(grammar)
        began = perf_counter()
        templates.renew(template)
        took.append(perf_counter() - began)
    return took


@app.command(help=__doc__)
def run(
    *,
    model_dir: Annotated[Path, typer.Option(help="Made by `fleet pull`.", file_okay=False)],
    rows: Annotated[str, typer.Option(help="Rows a step, with commas.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    cache_dir: Annotated[Path | None, typer.Option(help="Packed weights, kernels.")] = None,
) -> None:
    model = load_native(
        model_dir,
        cache=cache_dir or default_cache({}),
        weights="u12",
        kv_tokens=8192,
        block_tokens=BLOCK,
        max_running=MOST_ROWS,
        max_step_tokens=512,
        threads=threads,
    )
    assert model.templates is not None
    masks = Timed(model.templates, MOST_ROWS, model.vocab_size)
    model.runner._masks = masks  # type: ignore[attr-defined]  # noqa: SLF001  to be timed
    table = []
    for count in map(int, rows.split(",")):
        times = {part: Times() for part in PARTS}
        one = Rows(model, masks, count)
        for n in range(rounds):
            for part in (*PARTS[n % 3 :], *PARTS[: n % 3]):
                one.play(GRAMMARS.get(part), n, times[part])
        table += [[f"{count}", part, said(it.step), said(it.masks)] for part, it in times.items()]
    heads = ["rows", "grammar", "step, us", "of it masks, us"]
    typer.echo(markdown(heads, table))
    for part, grammar in GRAMMARS.items():
        took = said([1e6 * it for it in compile_s(model.templates, grammar)])
        typer.echo(f"{part}: compiled in {took} us")
    typer.echo(f"{machine()}; {threads} threads, {rounds} rounds in turn of {STEPS} steps each.")


if __name__ == "__main__":
    app()
