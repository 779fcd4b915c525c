"""`python -m loadtest.bench.engine --model-dir FOLDER`: an engine process alone, without HTTP.

Speaks to `infire serve` as its worker does, so it measures any runner that the engine has. Flags
of the engine that this does not know go through: --engine-flags "--weights bf16".
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer

from loadtest.bench.engine_runs import EngineFigures, EnginePlan, Failed, measure_engine
from loadtest.bench.roofline import Machine, Model, measure_machine, read_model
from loadtest.bench.serve import counts
from loadtest.bench.table import markdown, number
from origin_gpu.engine_process import EngineLost
from routing.preflight import usable_cores

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(  # noqa: PLR0913  one parameter a flag
    *,
    model_dir: Annotated[Path, typer.Option(help="Made by `infire pull`.", file_okay=False)],
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,4,8,16,32",
    prefill: Annotated[str, typer.Option(help="Lengths of prompts.")] = "512,2048",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Before decoding.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each sequence.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 3,
    kv_tokens: Annotated[int, typer.Option(min=1, help="Reserved, and touched.")] = 16384,
    threads: Annotated[int, typer.Option(min=0, help="0: one a usable core.")] = 0,
    weight_bytes: Annotated[
        float, typer.Option(help="Of a weight, for the roofline: 2 in BF16, 1.5 in 12 bits.")
    ] = 2.0,
    engine_flags: Annotated[str, typer.Option(help="More of `infire serve`.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures there, too.")] = None,
) -> None:
    threads = threads or usable_cores()
    words = [sys.executable, "-m", "infire", "serve", "--model", "bench"]
    words += ["--model-dir", str(model_dir), "--kv-tokens", str(kv_tokens)]
    words += ["--threads", str(threads), *shlex.split(engine_flags)]
    plan = EnginePlan(
        command=tuple(words),
        batches=counts(batches),
        prefill_tokens=counts(prefill),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        kv_tokens=kv_tokens,
    )
    try:
        figures = anyio.run(measure_engine, plan)
    except (EngineLost, Failed) as exc:
        sys.exit(str(exc))
    if json is not None:
        json.write_bytes(msgspec.json.encode(figures))
    model = read_model(model_dir)
    machine = measure_machine(model, threads)
    sys.stdout.write(shown(figures, plan, model, machine, weight_bytes))


def shown(
    figures: EngineFigures, plan: EnginePlan, model: Model, machine: Machine, weight_bytes: float
) -> str:
    """The figures beside what the machine would allow, as Markdown."""
    context = plan.prompt_tokens + plan.output_tokens // 2
    rows = []
    for one in figures.decodes:
        least_s = model.step_s(machine, batch=one.batch, context=context, weight_bytes=weight_bytes)
        rows.append(_row(f"decode, batch {one.batch}", one.rate, one.batch / least_s))
    for prefill in figures.prefills:
        least_s = model.prefill_s(machine, prefill.num_tokens)
        limit = prefill.num_tokens / least_s if least_s else None
        rows.append(_row(f"prefill, {prefill.num_tokens} tokens", prefill.rate, limit))
    return (
        markdown(["", "tok/s", "roofline, tok/s", "reached"], rows)
        + f"\n{figures.device}, {figures.dtype}, {figures.threads} threads; medians of "
        + f"{plan.repeats}. Start to first token {number(figures.start_s)} s. Peak memory with "
        + f"{plan.kv_tokens} tokens of KV touched {number(figures.peak_bytes / 1e6)} MB.\n"
        + f"Of this machine: {machine}.\n"
    )


def _row(name: str, rate: float, limit: float | None) -> list[str]:
    if limit is None:
        return [name, number(rate), "-", "-"]
    return [name, number(rate), number(limit), f"{100 * rate / limit:.0f} %"]


if __name__ == "__main__":
    app()
