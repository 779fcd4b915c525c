"""`python -m unweight.kernels_check`: what the compiler makes of every kernel, without a GPU.

Compiles all of them for sm_80, sm_90 and sm_100. Nothing may spill, and products must be those of
tensor cores. Of the fused product on sm_90 the main loop must load 128 bits at a time; up to 32
rows, where it should wait for memory and nothing else, it may have 5.2 instructions for a weight,
of which 2.3 of the ALU pipe: more, and decoding takes longer than reading.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from unweight.kernels_check.verdict import Verdict

_INTERPRET = "TRITON_INTERPRET"  # read when a kernel is defined: an interpreted one is no kernel

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(
    *,
    target: Annotated[list[int] | None, typer.Option(help="80, 90, 100; all if none.")] = None,
    fused: Annotated[bool, typer.Option("--fused", help="Only the fused product.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="That compile.")] = os.cpu_count() or 1,
) -> None:
    os.environ.pop(_INTERPRET, None)  # here and in the processes that are started
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is: Triton 3.9 warns if unset
    try:
        from unweight.gpu.compiled import TARGETS, jobs
        from unweight.kernels_check.verdict import check
    except ImportError as error:
        print(f"kernels_check: {error}: pip install 'edgefire[gpu]', on Linux", file=sys.stderr)
        raise typer.Exit(1) from None
    if unknown := set(target or []) - set(TARGETS):
        print(f"kernels_check: --target {min(unknown)} is not 80, 90 or 100", file=sys.stderr)
        raise typer.Exit(1)
    listed = [job for one in target or TARGETS for job in jobs(one) if job.launch or not fused]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        verdicts = list(pool.imap(check, listed))
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    else:
        _show(verdicts)
    if any(verdict.faults for verdict in verdicts):
        raise typer.Exit(1)


def _show(verdicts: Sequence[Verdict]) -> None:
    from unweight.kernels_check.verdict import BOUND_BY_MEMORY, MOST_ALU, MOST_INSTRUCTIONS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", no_wrap=True)
    table.add_column("target")
    for head in ("registers", "shared", "stack", "loads", "ALU/w", "IMAD/w", "all/w"):
        table.add_column(head, justify="right")
    table.add_column("tensor cores")
    table.add_column("verdict")
    for one in verdicts:
        counts = [one.alu, one.imad, one.instructions]
        table.add_row(
            one.kernel, one.target, str(one.registers), f"{one.shared_bytes:,}",
            str(one.stack_bytes), f"{one.load_bits} bits" if one.load_bits else "",
            *("" if count is None else f"{count:.2f}" for count in counts),
            ", ".join(sorted({name.split(".")[0] for name in one.tensor})),
            "; ".join(one.faults) or "holds",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    console.print(
        f"/w: instructions of a thread in the main loop for a weight; up to {BOUND_BY_MEMORY} rows "
        f"at most {MOST_ALU} of the ALU pipe, {MOST_INSTRUCTIONS} in all. IMAD is for the FMA pipe."
    )


if __name__ == "__main__":
    app()
