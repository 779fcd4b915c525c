"""`origin-gpu front` and `origin-gpu worker`: the server processes of a region.

A flag may also be given in the environment (ORIGIN_GPU_WORKER_KV_TOKENS for `worker --kv-tokens`)
or in a TOML file named by `--config`, with a table `[front]` or `[worker]` (kv_tokens = 4096).
What is on the command line goes first, then the environment, then the file.
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from origin_gpu.settings import (
    LOCAL_TOKENS,
    FrontSettings,
    WorkerRole,
    WorkerSettings,
    parse_ways,
    parse_worker,
)
from origin_gpu.waits import MAX_WAIT_S
from routing import logs
from routing.drain import GRACE_S
from routing.preflight import usable_cores
from routing.secret import read_secret

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A region's front and its workers.",
    context_settings={"auto_envvar_prefix": "ORIGIN_GPU"},
)

Name = Annotated[str, typer.Option(help="Of this process, in logs and reports.")]
RegionName = Annotated[str, typer.Option("--region", help="That it belongs to.")]
SecretFile = Annotated[Path, typer.Option(help="Holds the fleet's secret.", dir_okay=False)]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")]
Fd = Annotated[int | None, typer.Option(help="Inherited listening socket, instead of a port.")]
Grace = Annotated[
    float, typer.Option(help="That what it has to do may take once it is told to stop.", min=0.0)
]


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with flags.")] = None,
) -> None:
    if config is None:
        return
    try:
        context.default_map = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:  # tomllib's errors are ValueErrors
        raise typer.BadParameter(f"{config}: {exc}", param_hint="--config") from exc


def _check_secret(path: Path) -> None:
    try:
        read_secret(path)
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(str(exc), param_hint="--secret-file") from exc


@app.command()
def front(  # noqa: PLR0913  one parameter a flag
    *,
    name: Name,
    region: RegionName,
    worker: Annotated[list[str], typer.Option(help="NAME=ROLE@URL; once for each worker.")],
    secret_file: SecretFile,
    local_tokens: Annotated[
        int, typer.Option(help="Prompt tokens that a decode worker computes itself.", min=0)
    ] = LOCAL_TOKENS,
    journal: Annotated[
        Path | None, typer.Option(help="SQLite file: a row a request.", dir_okay=False)
    ] = None,
    journal_days: Annotated[float, typer.Option(help="That a row is kept.", min=0)] = 7.0,
    journal_rows: Annotated[int, typer.Option(help="Kept at most.", min=1)] = 1_000_000,
    host: Host = "127.0.0.1",
    port: Port = 0,
    fd: Fd = None,
    grace_s: Grace = GRACE_S,
    max_wait_s: Annotated[
        float,
        typer.Option(help="Longest expected wait for a first token; 0: no bound.", min=0.0),
    ] = MAX_WAIT_S,
) -> None:
    """The door of a region: requests from edges go to its workers."""
    from origin_gpu.front import run

    try:
        workers = tuple(parse_worker(text) for text in worker)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--worker") from exc
    _check_secret(secret_file)
    logs.start(name)
    run(
        FrontSettings(
            name=name,
            region=region,
            workers=workers,
            secret_file=secret_file,
            local_tokens=local_tokens,
            journal=journal,
            journal_days=journal_days,
            journal_rows=journal_rows,
            host=host,
            port=port,
            fd=fd,
            grace_s=grace_s,
            max_wait_s=max_wait_s,
        )
    )


@app.command()
def worker(  # noqa: PLR0913  one parameter a flag
    *,
    name: Name,
    region: RegionName,
    role: Annotated[WorkerRole, typer.Option(help="What it does for the front.")],
    model: Annotated[str, typer.Option(help="Name under which clients ask for it.")],
    model_dir: Annotated[Path, typer.Option(help="Made by `infire pull`.", file_okay=False)],
    secret_file: SecretFile,
    host: Host = "127.0.0.1",
    port: Port = 0,
    fd: Fd = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or auto.")] = "auto",
    kv_tokens: Annotated[int, typer.Option(help="Tokens whose KV fits.", min=1)] = 16384,
    block_tokens: Annotated[int, typer.Option(help="Tokens a KV block holds.", min=1)] = 16,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens a step computes.", min=1)] = 512,
    max_running: Annotated[int, typer.Option(help="Sequences a step serves.", min=1)] = 64,
    max_waiting: Annotated[int, typer.Option(help="Queued before refusing.", min=1)] = 256,
    lease_s: Annotated[float, typer.Option(help="KV nobody collects lasts this long.")] = 30.0,
    stuck_s: Annotated[
        float, typer.Option(help="An engine silent for so long is started anew.", min=1.0)
    ] = 60.0,
    grace_s: Grace = GRACE_S,
    prefix_cache: Annotated[
        bool, typer.Option(help="Share the KV of prompts that begin alike.")
    ] = True,
    host_cache_bytes: Annotated[
        int, typer.Option(help="Of KV that the device has no place for, in memory.", min=0)
    ] = 0,
    disk_cache_dir: Annotated[
        Path | None, typer.Option(help="And in files, which a restart finds.", file_okay=False)
    ] = None,
    disk_cache_bytes: Annotated[int, typer.Option(help="Of these.", min=0)] = 8 << 30,
    threads: Annotated[int, typer.Option(help="Of the engine on a CPU.", min=1)] = usable_cores(),
    kv_ways: Annotated[
        str, typer.Option(help="How KV may go, best first: shared, nixl; tcp always.")
    ] = "shared",
    engine_command: Annotated[str, typer.Option(help="Starts the engine.")] = shlex.join(
        (sys.executable, "-m", "infire", "serve")
    ),
) -> None:
    """A worker: prefills for others, decodes for others, or both."""
    from origin_gpu.worker_app import run

    try:
        ways = parse_ways(kv_ways)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--kv-ways") from exc
    _check_secret(secret_file)
    logs.start(name)
    code = run(
        WorkerSettings(
            name=name,
            region=region,
            role=role,
            model=model,
            model_dir=model_dir,
            secret_file=secret_file,
            engine_command=tuple(shlex.split(engine_command)),
            host=host,
            port=port,
            fd=fd,
            device=device,
            dtype=dtype,
            kv_tokens=kv_tokens,
            block_tokens=block_tokens,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            lease_s=lease_s,
            stuck_s=stuck_s,
            prefix_cache=prefix_cache,
            host_cache_bytes=host_cache_bytes,
            disk_cache_dir=disk_cache_dir,
            disk_cache_bytes=disk_cache_bytes,
            grace_s=grace_s,
            threads=threads,
            kv_ways=ways,
        )
    )
    raise typer.Exit(code)


def main() -> None:
    app(prog_name="origin-gpu")


if __name__ == "__main__":
    main()
