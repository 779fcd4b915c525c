"""`python -m loadtest.bench.peers`: ours beside the peers installed here, in one interleaved run.

In every round each server is started, timed to its first token, stopped, started again, warmed up,
measured, stopped; one runs at a time. Each round begins with another of them. Every measured round
is written down at once; the table of all rounds goes into a Markdown file.
"""

from __future__ import annotations

import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer

from loadtest.bench.client import client
from loadtest.bench.measure import Plan, Served, measure, warm_up
from loadtest.bench.ours import Ours, Refused
from loadtest.bench.rounds import Round, notes, peers_table
from loadtest.bench.serve import counts
from loadtest.bench.servers import Contestant, NotUp, llama_cpp, openvino, vllm
from loadtest.bench.streams import BrokenStream
from loadtest.bench.table import with_part
from routing.errors import Failure
from routing.keys import NoKey
from routing.preflight import usable_cores

README = Path(__file__).parents[1] / "README.md"
PART = "peers"
FAILURES = (NotUp, BrokenStream, Refused, Failure, NoKey, TimeoutError)  # of a server
CPUINFO = Path("/proc/cpuinfo")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is compared, how often, and where it is written down."""

    contestants: tuple[Contestant, ...]
    plan: Plan
    rounds: int
    memory_rounds: int
    folder: Path  # logs, and rounds.jsonl with every measured round

    @property
    def log(self) -> Path:
        return self.folder / "servers.log"

    async def measure(self) -> list[Round]:
        """Every round, each begun by another contestant."""
        measured = []
        for number in range(self.rounds):
            first = number % len(self.contestants)
            for contestant in (*self.contestants[first:], *self.contestants[:first]):
                sys.stderr.write(f"round {number + 1} of {self.rounds}: {contestant.name}\n")
                try:
                    measured.append(await self._measure_one(contestant, number))
                except* FAILURES as failures:
                    sys.stderr.write(f"not measured: {failures.exceptions}\n")
                else:
                    with (self.folder / "rounds.jsonl").open("ab") as file:
                        file.write(msgspec.json.encode(measured[-1]) + b"\n")
        return sorted(measured, key=lambda one: (not one.ours, one.server))

    async def _measure_one(self, contestant: Contestant, number: int) -> Round:
        if number == 0:
            await contestant.first_token_s(self.log)  # fills caches: of files, of compiled code
        start_s = await contestant.first_token_s(self.log)
        served = await self._served(contestant, number)
        remembers = number < self.memory_rounds
        return Round(
            server=contestant.name,
            version=contestant.version,
            ours=isinstance(contestant, Ours),
            round=number,
            served=served,
            start_s=start_s,
            peak_bytes=await contestant.peak_bytes(self.log) if remembers else None,
        )

    async def _served(self, contestant: Contestant, number: int) -> Served:
        async with contestant.serving(self.log) as target, client(target) as asking:
            await warm_up(asking, self.plan)
            return await measure(asking, self.plan, number)


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
    vllm_preload: Annotated[Path | None, typer.Option(help="libtcmalloc_minimal.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    memory_rounds: Annotated[int, typer.Option(min=0, help="With peak memory.")] = 1,
    concurrency: Annotated[str, typer.Option(help="Streams at once.")] = "1,4,8,16,32",
    prefill: Annotated[str, typer.Option(help="Lengths of long prompts.")] = "512,2048",
    folder: Annotated[Path | None, typer.Option(help="For logs and caches; or a new one.")] = None,
    readme: Annotated[Path, typer.Option(help="Gets the table, between its marks.")] = README,
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops what it started, as ^C does
    threads = usable_cores()
    folder = folder or Path(tempfile.mkdtemp(prefix="edgefire-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    contestants: list[Contestant] = [
        parse_ours(text, model_dir, folder, threads, body) for text in ours or ["Edgefire"]
    ]
    if llama_server and llama_gguf:
        contestants.append(llama_cpp(llama_server, llama_gguf, threads))
    if openvino_python and openvino_model:
        contestants.append(openvino(openvino_python, openvino_model, model_dir, threads))
    if vllm_python:
        contestants.append(vllm(vllm_python, vllm_preload, model_dir))
    plan = Plan(concurrency=counts(concurrency), prefill_tokens=counts(prefill))
    with_part(readme.read_text(), PART, "")  # without the marks, let it fail now
    sys.stderr.write(f"Logs and figures: {folder}\n")
    planned = Run(
        contestants=tuple(contestants),
        plan=plan,
        rounds=rounds,
        memory_rounds=memory_rounds,
        folder=folder,
    )
    measured = anyio.run(planned.measure)
    if not measured:
        sys.exit(f"no server could be measured: see {planned.log}")
    part = report(measured, datetime.now(UTC), machine())
    sys.stdout.write(part)
    readme.write_text(with_part(readme.read_text(), PART, part))


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


def report(rounds: Sequence[Round], at: datetime, where: str) -> str:
    """The part of the README: when, where, what, the table and what it does not show."""
    versions = {one.server: one.version for one in rounds}
    compared = "; ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{at:%Y-%m-%d}, {where}. {compared}.\n\n{peers_table(rounds)}\n"
        + "\n".join(notes(rounds))
        + "\n"
    )


def machine() -> str:
    """The processor and how many of its cores may be used."""
    name = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {usable_cores()} cores"


if __name__ == "__main__":
    app()
