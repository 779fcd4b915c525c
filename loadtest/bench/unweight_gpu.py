"""`python -m loadtest.bench.unweight_gpu`: 12-bit weights against BF16 on one CUDA device.

In one run: the device's ceilings; packing, decoding and look-up, bit for bit; tuning; every product
of Llama-3.1-8B against float64 and against `torch.matmul` and the kernel's BF16 twin, from CUDA
graphs over 8 copies of each matrix; a layer end to end. Writes a table as it goes, and the plans
it found. `--no-tune` measures the plans that are known, and compiles few kernels.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer

from loadtest.bench.gpu.ceilings import copy_tb_s, matmul_tflop_s
from loadtest.bench.gpu.end_to_end import layer_us
from loadtest.bench.gpu.exact import check_exact, check_rest
from loadtest.bench.gpu.matrices import LAYER, SHAPES, copies, weights
from loadtest.bench.gpu.measure import ROWS, Bench, Row, launch_of
from loadtest.bench.gpu.report import layer_table, rows_table
from loadtest.bench.gpu.warm import Job, compile_all
from unweight.gpu.linear import Scratch, new_scratch
from unweight.gpu.pack import pack_on_device
from unweight.gpu.plans import Plans, ShapePlan, file_name, find, save
from unweight.gpu.tune import choose, crossover, launches, remeasure, splits

_COPIES = 8  # of every matrix: the smallest has 34 MB, and L2 50
_PROCESSES = max(1, (os.cpu_count() or 2) - 1)  # that compile, and threads that decode

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    out: Annotated[Path, typer.Option(help="A folder for the table and the plans.")] = Path("."),
    rounds: Annotated[int, typer.Option(min=3, help="Medians are of so many.")] = 9,
    only: Annotated[str, typer.Option(help="Some matrices, with commas between.")] = "",
    tune: Annotated[bool, typer.Option(help="Search for launches, or take those known.")] = True,
) -> None:
    if not torch.cuda.is_available():
        typer.echo("no CUDA device: nothing can be measured here", err=True)
        raise typer.Exit(1)
    report = Report(out / "table.md")
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_name(device)
    report.say(
        f"{_made()}: copy {copy_tb_s(device):.2f} TB/s, "
        f"BF16 product {matmul_tflop_s(device):.0f} TFLOP/s"
    )
    names = only.split(",") if only else list(SHAPES)
    known = None if tune else find(gpu)
    compile_all(_jobs(names, known), processes=_PROCESSES)
    report.say(f"kernels compiled by {_PROCESSES} processes")
    scratch = new_scratch(device)
    plans: dict[tuple[int, int], ShapePlan] = {}
    rows: list[Row] = []
    for name in names:
        plans[SHAPES[name]], found = _measure(name, known, scratch, rounds, report)
        rows += found
        report.say(rows_table(found))
        save(Plans(gpu=gpu, measured=_made(), shapes=plans), out / file_name(gpu))
        torch.cuda.empty_cache()
    layers = layer_us(plans, scratch, rounds) if set(LAYER) <= set(names) else {}
    report.say(rows_table(rows))
    report.say(layer_table(layers))
    verified = {f"layer_gain_{m}": round(gain, 4) for m, (_, _, gain) in layers.items()}
    save(Plans(gpu=gpu, measured=_made(), shapes=plans, verified=verified), out / file_name(gpu))


class Report:
    """What is printed and written as it is found: what has ended early has left something."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{text}\n\n")
        typer.echo(f"[{time.monotonic() - self._began:.0f} s] {text}")


def _measure(
    name: str, known: Plans | None, scratch: Scratch, rounds: int, report: Report
) -> tuple[ShapePlan, list[Row]]:
    shape = SHAPES[name]
    dense = weights(*shape, seed=1, device=torch.device("cuda"))
    report.say(check_exact(name, dense))
    if name == "gate_up":
        report.say(check_rest(name, dense, threads=_PROCESSES))
    bench = Bench(copies(dense, pack_on_device(dense), _COPIES), scratch)
    if known is None:
        plan = choose(bench.timer, splits(*shape))
    else:
        plan = remeasure(bench.timer, known.plan(*shape))
    report.say(f"{name}: inputs in {plan.split} ranges")
    rows = [bench.row(name, num_rows, plan, rounds) for num_rows in ROWS]
    report.say(
        f"{name}: a row is the same bits in any batch: {bench.first_rows_agree(plan)}; decoding "
        f"first is faster from {crossover(plan) or 'no number of'} rows on"
    )
    return plan, rows


def _made() -> str:
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    )


def _jobs(names: list[str], known: Plans | None) -> set[Job]:
    """What will be launched: all that `choose` tries, or what is known."""
    jobs: set[Job] = set()
    for name in names:
        chunks = triton.next_power_of_2(-(-SHAPES[name][1] // 1024))
        if known is not None:
            plan = known.plan(*SHAPES[name])
            jobs |= {(launch_of(plan, rows), plan.split, chunks) for rows in ROWS}
            continue
        for split, rows in product(splits(*SHAPES[name]), (16, 32, 64, 128, 256)):
            jobs |= {(launch, split, chunks) for launch in launches(rows)}
    return jobs


if __name__ == "__main__":
    app()
