"""`python -m loadtest.bench.serve --url URL`: what any OpenAI-compatible server does.

Asks by streamed chat completions and counts tokens by the server's own usage. Answers are to have
the same length everywhere, which needs an extension, `ignore_eos`, that llama.cpp and vLLM take,
too; answers that end early are counted and told.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer

from loadtest.bench.client import Target, client
from loadtest.bench.measure import Plan, Served, measure, warm_up
from loadtest.bench.streams import BrokenStream
from loadtest.bench.table import served_table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Plan()


def counts(text: str) -> tuple[int, ...]:
    """`1,4,8` as numbers; BadParameter of anything else."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r} is not a list like 1,4,8")
    return tuple(int(word) for word in words)


@app.command(help=__doc__)
def run(  # noqa: PLR0913  one parameter a flag
    *,
    url: Annotated[str, typer.Option(help="Up to but without /chat/completions.")],
    model: Annotated[str, typer.Option(help="As the server names it.")],
    token: Annotated[str | None, typer.Option(help="Bearer.", envvar="EDGEFIRE_TOKEN")] = None,
    concurrency: Annotated[str, typer.Option(help="Streams at once.")] = "1,4,8,16,32",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = DEFAULT.prompt_tokens,
    output_tokens: Annotated[int, typer.Option(min=2)] = DEFAULT.output_tokens,
    waves: Annotated[int, typer.Option(min=1, help="Requests a stream.")] = DEFAULT.waves,
    prefill: Annotated[str, typer.Option(help="Lengths of long prompts.")] = "512,2048",
    body: Annotated[str, typer.Option(help="JSON, added to every request.")] = (
        '{"ignore_eos": true}'
    ),
    marks_end: Annotated[bool, typer.Option(help="Whether its streams end in [DONE].")] = True,
    seed: Annotated[int, typer.Option(help="Of prompts: another one, other prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures there, too.")] = None,
) -> None:
    target = Target(
        url=url.rstrip("/"),
        model=model,
        token=token,
        extra=msgspec.json.decode(body, type=dict),
        marks_end=marks_end,
    )
    plan = Plan(
        concurrency=counts(concurrency),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        waves=waves,
        prefill_tokens=counts(prefill),
    )
    try:
        served = anyio.run(_serve, target, plan, seed)
    except BrokenStream as exc:
        sys.exit(str(exc))
    if json is not None:
        json.write_bytes(msgspec.json.encode(served))
    sys.stdout.write(served_table(served))


async def _serve(target: Target, plan: Plan, seed: int) -> Served:
    async with client(target) as asking:
        await warm_up(asking, plan)
        return await measure(asking, plan, seed)


if __name__ == "__main__":
    app()
