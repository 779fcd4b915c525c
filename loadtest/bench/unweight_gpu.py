"""`python -m loadtest.bench.unweight_gpu`: 12-bit weights against BF16 on one CUDA device.

In one run: the device's ceilings; packing, decoding and look-up, bit for bit; tuning; every product
of Llama-3.1-8B against float64 and against `torch.matmul` and the kernel's BF16 twin, from CUDA
graphs over 8 copies of each matrix; a layer end to end. Writes a table, and the plans it found.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer

from loadtest.bench.gpu.ceilings import copy_tb_s, matmul_tflop_s
from loadtest.bench.gpu.end_to_end import layer_us
from loadtest.bench.gpu.exact import check_exact, check_rest
from loadtest.bench.gpu.matrices import LAYER, SHAPES, copies, weights
from loadtest.bench.gpu.measure import ROWS, Bench, Row
from loadtest.bench.gpu.report import layer_table, rows_table
from loadtest.bench.gpu.warm import compile_all
from unweight.gpu.linear import Scratch, new_scratch
from unweight.gpu.pack import pack_on_device
from unweight.gpu.plans import Plans, ShapePlan, file_name, save
from unweight.gpu.tune import choose, crossover, launches, splits

_PROCESSES = max(1, (os.cpu_count() or 2) - 1)  # that compile, and threads that decode

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    out: Annotated[Path, typer.Option(help="A folder for the table and the plans.")] = Path("."),
    rounds: Annotated[int, typer.Option(min=3, help="Medians are of so many.")] = 9,
    num_copies: Annotated[int, typer.Option(min=8, help="Of every matrix.")] = 8,
    only: Annotated[str, typer.Option(help="Some matrices, with commas between.")] = "",
) -> None:
    if not torch.cuda.is_available():
        typer.echo("no CUDA device: nothing can be measured here", err=True)
        raise typer.Exit(1)
    report = Report()
    device = torch.device("cuda")
    report.say(
        f"{_made()}: copy {copy_tb_s(device):.2f} TB/s, "
        f"BF16 product {matmul_tflop_s(device):.0f} TFLOP/s"
    )
    names = only.split(",") if only else list(SHAPES)
    _compile(names)
    scratch = new_scratch(device)
    plans: dict[tuple[int, int], ShapePlan] = {}
    rows: list[Row] = []
    for name in names:
        plan, found = _measure(name, scratch, num_copies, rounds, report)
        plans[SHAPES[name]] = plan
        rows += found
        torch.cuda.empty_cache()
    layers = layer_us(plans, scratch, rounds) if set(LAYER) <= set(names) else {}
    report.say(rows_table(rows))
    report.say(layer_table(layers))
    (out / "table.md").write_text("\n\n".join(report.lines) + "\n")
    verified = {f"layer_gain_{m}": round(gain, 4) for m, (_, _, gain) in layers.items()}
    gpu = torch.cuda.get_device_name(device)
    save(Plans(gpu=gpu, measured=_made(), shapes=plans, verified=verified), out / file_name(gpu))


class Report:
    """What is printed as it is found, and written in the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        self.lines.append(text)
        typer.echo(f"[{time.monotonic() - self._began:.0f} s] {text}")


def _measure(
    name: str, scratch: Scratch, num_copies: int, rounds: int, report: Report
) -> tuple[ShapePlan, list[Row]]:
    shape = SHAPES[name]
    dense = weights(*shape, seed=1, device=torch.device("cuda"))
    report.say(check_exact(name, dense))
    if name == "gate_up":
        report.say(check_rest(name, dense, threads=_PROCESSES))
    bench = Bench(copies(dense, pack_on_device(dense), num_copies), scratch)
    plan = choose(bench.timer, splits(*shape))
    rows = [bench.row(name, num_rows, plan, rounds) for num_rows in ROWS]
    report.say(
        f"{name}: inputs in {plan.split} ranges; a row is the same bits in any batch: "
        f"{bench.first_rows_agree(plan)}; decoding first is faster from "
        f"{crossover(plan) or 'no number of'} rows on"
    )
    return plan, rows


def _made() -> str:
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    )


def _compile(names: list[str]) -> None:
    jobs = {
        (launch, split, triton.next_power_of_2(-(-SHAPES[name][1] // 1024)))
        for name in names
        for split in splits(*SHAPES[name])
        for rows in (16, 32, 64, 128, 256)
        for launch in launches(rows)
    }
    compile_all(jobs, processes=_PROCESSES)


if __name__ == "__main__":
    app()
