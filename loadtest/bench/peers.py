"""`python -m loadtest.bench.peers`: ours beside the peers installed here, in one interleaved run.

In every round each server is started, timed to its first token, stopped, started again, warmed up,
measured, stopped; one runs at a time. Each round begins with another of them. Every measured round
is written down at once; the table of all rounds goes into a Markdown file.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer

from loadtest.bench.interleaved import Record, Run
from loadtest.bench.limits import limits_part
from loadtest.bench.measure import Plan
from loadtest.bench.ours import Ours
from loadtest.bench.processor import Processor, machine, processor
from loadtest.bench.roofline import measure_apart, read_model
from loadtest.bench.rounds import notes, peers_table
from loadtest.bench.serve import counts
from loadtest.bench.servers import Contestant, llama_cpp, openvino, transformers, vllm
from loadtest.bench.table import with_part
from routing.preflight import usable_cores

README = Path(__file__).parents[1] / "README.md"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def run(  # noqa: PLR0913  one parameter a flag
    *,
    model_dir: Annotated[Path, typer.Option(help="Of ours; the peers' tokenizer, too.")],
    ours: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:VARIABLE=VALUE,...; once for each setting of ours."),
    ] = None,
    body: Annotated[str, typer.Option(help="JSON, added to every request to ours.")] = (
        '{"ignore_eos": true}'
    ),
    llama_server: Annotated[Path | None, typer.Option(help="And --llama-gguf.")] = None,
    llama_gguf: Annotated[Path | None, typer.Option(help="The model in BF16.")] = None,
    openvino_python: Annotated[Path | None, typer.Option(help="And --openvino-model.")] = None,
    openvino_model: Annotated[Path | None, typer.Option(help="Made by optimum-cli.")] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="That has vllm.")] = None,
    vllm_preload: Annotated[
        str | None, typer.Option(help="libtcmalloc_minimal, libiomp5: joined by a colon.")
    ] = None,
    transformers_python: Annotated[
        Path | None, typer.Option(help="That has transformers[serving].")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    memory_rounds: Annotated[int, typer.Option(min=0, help="With peak memory.")] = 1,
    concurrency: Annotated[str, typer.Option(help="Streams at once.")] = "1,4,8,16,32",
    prefill: Annotated[str, typer.Option(help="Lengths of long prompts.")] = "512,2048",
    folder: Annotated[Path | None, typer.Option(help="For logs and caches; or a new one.")] = None,
    readme: Annotated[Path, typer.Option(help="Gets the table, between its marks.")] = README,
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops what it started, as ^C does
    threads, bf16 = usable_cores(), processor().computes_bf16
    folder = folder or Path(tempfile.mkdtemp(prefix="edgefire-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    contestants: list[Contestant] = [
        parse_ours(text, model_dir, folder, threads, body) for text in ours or ["Edgefire"]
    ]
    if llama_server and llama_gguf:
        contestants.append(llama_cpp(llama_server, llama_gguf, threads))
    if openvino_python and openvino_model:
        contestants.append(
            openvino(openvino_python, openvino_model, model_dir, threads=threads, bf16=bf16)
        )
    if vllm_python:
        contestants.append(vllm(vllm_python, vllm_preload, model_dir, bf16=bf16))
    if transformers_python:
        contestants.append(transformers(transformers_python, model_dir, bf16=bf16))
    plan = Plan(concurrency=counts(concurrency), prefill_tokens=counts(prefill))
    name = part_name(processor())
    with_part(readme.read_text(), name, "")  # without the marks, let it fail now
    sys.stderr.write(f"Logs and figures: {folder}\n")
    planned = Run(
        contestants=tuple(contestants),
        plan=plan,
        rounds=rounds,
        memory_rounds=memory_rounds,
        folder=folder,
    )
    model = read_model(model_dir)
    allowed = measure_apart(model, threads)
    record = anyio.run(planned.measure)
    if not record.rounds:
        sys.exit(f"no server could be measured: see {planned.log}")
    allowed = allowed.or_better(measure_apart(model, threads))
    part = report(record, datetime.now(UTC), machine())
    part += "\n" + limits_part(record.rounds, plan, model, allowed)
    sys.stdout.write(part)
    readme.write_text(with_part(readme.read_text(), name, part))


def part_name(machine: Processor) -> str:
    """A table for each kind of processor: figures of one say little of another."""
    return f"peers, {machine.instructions or 'other processors'}"


def parse_ours(text: str, model_dir: Path, folder: Path, threads: int, body: str) -> Ours:
    """NAME:VARIABLE=VALUE,... as a contestant; BadParameter of anything else."""
    name, _, settings = text.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    if not name or not all(variable and mark for variable, mark, _ in pairs):
        raise typer.BadParameter(f"{text!r} is not NAME or NAME:VARIABLE=VALUE,...")
    return Ours(
        name=name,
        model_dir=model_dir.absolute(),
        home=folder.absolute() / "home",
        threads=threads,
        environ={variable: value for variable, _, value in pairs},
        extra=msgspec.json.decode(body, type=dict[str, object]),
    )


def report(record: Record, at: datetime, where: str) -> str:
    """The part of the README: when, where, what, the table and what it does not show."""
    rounds, missed = record.rounds, record.missed
    versions = {one.server: one.version for one in missed}
    versions = {one.server: one.version for one in rounds} | versions
    compared = "; ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{at:%Y-%m-%d}, {where}. {compared}.\n\n{peers_table(rounds, missed)}\n"
        + "\n".join(notes(rounds, missed))
        + "\n"
    )


if __name__ == "__main__":
    app()
