"""`edge serve`: the worker near the callers; `edge key ...`: the keys that callers show.

A flag may also be given in the environment (EDGE_SERVE_BUDGET_S for `serve --budget-s`), or in the
`[edge]` table of the fleet file. What is on the command line goes first, then the environment,
then the file.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from edge.settings import Compat, Settings, read_fleet, settings_of
from routing import logs
from routing.drain import Drain
from routing.paths import paths
from routing.secret import read_secret

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The worker near the callers, and the keys they show.",
    context_settings={"auto_envvar_prefix": "EDGE"},
)
key = typer.Typer(no_args_is_help=True, help="Keys: signed, checked without any call.")
app.add_typer(key, name="key")

HERE = paths(os.environ)

KeysDir = Annotated[Path, typer.Option(help="Keys and revocations.", file_okay=False)]


@app.command()
def serve(  # noqa: PLR0913  one parameter a flag
    *,
    fleet: Annotated[Path, typer.Option(help="TOML or JSON: where regions are.", dir_okay=False)],
    secret_file: Annotated[Path, typer.Option(help="Holds the fleet's secret.", dir_okay=False)],
    name: Annotated[str, typer.Option(help="Of this process, in logs and reports.")] = "edge",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8787,
    fd: Annotated[int | None, typer.Option(help="Inherited socket, instead of a port.")] = None,
    keys_dir: KeysDir = HERE.config / "keys",
    cache_dir: Annotated[Path, typer.Option(help="For tokenizers.", file_okay=False)] = HERE.cache,
    ledger: Annotated[
        Path, typer.Option(help="SQLite file: a row a request.", dir_okay=False)
    ] = HERE.state / "usage" / "ledger.sqlite",
    catalogue: Annotated[
        Path | None, typer.Option(help="TOML: more models than are known.", dir_okay=False)
    ] = None,
    store: Annotated[
        Path, typer.Option(help="SQLite file: jobs, files, replies, logs.", dir_okay=False)
    ] = HERE.state / "usage" / "store.sqlite",
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="Network whose cf-ip* and forwarding headers count; once for each. "
            "Without any: loopback."
        ),
    ] = None,
    geo_db: Annotated[
        Path | None, typer.Option(help="An .mmdb file: address to place.", dir_okay=False)
    ] = None,
    budget_s: Annotated[float | None, typer.Option(help="For one whole request.", min=0.1)] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="When the client names no max_tokens.", min=1)
    ] = None,
    compat: Annotated[
        Compat | None, typer.Option(help="workers-ai: natively 256 tokens where none are named.")
    ] = None,
    body_limit_bytes: Annotated[int | None, typer.Option(help="Of a request.", min=1)] = None,
    cold_s: Annotated[
        float | None,
        typer.Option(help="That a request waits for a model that is being loaded.", min=0.0),
    ] = None,
    stalled_reader_s: Annotated[
        float | None,
        typer.Option(help="A client that takes nothing for so long is hung up on.", min=0.1),
    ] = None,
    grace_s: Annotated[
        float | None,
        typer.Option(help="That requests have to end once it is told to stop.", min=0.0),
    ] = None,
    batch_in_flight: Annotated[
        int | None, typer.Option(help="Queued requests that are asked at once.", min=1)
    ] = None,
    result_days: Annotated[
        float | None, typer.Option(help="That answers of jobs, and files, are kept.", min=0.01)
    ] = None,
    log_days: Annotated[
        float | None, typer.Option(help="That request logs are kept.", min=0.01)
    ] = None,
    allow_private_webhooks: Annotated[
        bool | None,
        typer.Option(help="Call also webhooks that only this host or network can reach."),
    ] = None,
    limits: Annotated[
        Literal["off", "workers-ai"] | None, typer.Option(help="Of what each account may use.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may ask, or *; once for each."),
    ] = None,
) -> None:
    """Answer clients, from the nearest region that is well and has room."""
    from edge.app import create_app
    from routing.serving import serve_app

    flags = {
        "trusted_proxies": tuple(trusted_proxy) if trusted_proxy else None,
        "geo_db": geo_db,
        "budget_s": budget_s,
        "max_output_tokens": max_output_tokens,
        "compat": compat,
        "body_limit_bytes": body_limit_bytes,
        "cold_s": cold_s,
        "stalled_reader_s": stalled_reader_s,
        "grace_s": grace_s,
        "batch_in_flight": batch_in_flight,
        "result_days": result_days,
        "log_days": log_days,
        "allow_private_webhooks": allow_private_webhooks,
        "limits": limits,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
    }
    logs.start(name)
    try:
        settings: Settings = settings_of(
            read_fleet(fleet),
            {flag: value for flag, value in flags.items() if value is not None},
            name=name,
            secret=read_secret(secret_file),
            keys_dir=keys_dir,
            cache_dir=cache_dir,
            ledger=ledger,
            catalogue=catalogue,
            store=store,
        )
        drain = Drain(settings.grace_s)
        asgi = create_app(settings, drain)
    except (OSError, ValueError, sqlite3.Error) as exc:
        raise typer.BadParameter(str(exc)) from exc
    serve_app(asgi, host=host, port=port, fd=fd, drain=drain)


@key.command()
def create(
    *,
    account: Annotated[str, typer.Option(help="Account id: letters, digits, - and _.")],
    days: Annotated[int, typer.Option(help="That the key is good for.", min=1)] = 365,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Of this key, as text-generation=300/min or usd=5/month; repeated."),
    ] = None,
    priority: Annotated[
        int, typer.Option(help="Higher goes first; below 0: only where nothing else waits.")
    ] = 0,
    keys_dir: KeysDir = HERE.config / "keys",
) -> None:
    """Make a key and print it, alone on the last line of standard output."""
    from edge import keys

    try:
        grant = keys.Grant(limits=tuple(limit or ()), priority=priority)
        now = datetime.now(UTC).timestamp()
        made = keys.create(keys_dir, account, days=days, now=now, grant=grant)
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(str(exc)) from exc
    print(f"A key for account {account}, good for {days} days:", file=sys.stderr)
    print(made)


@key.command()
def revoke(
    key_or_jti: Annotated[
        str, typer.Argument(help="The key, or its id as `edge key list` has it.")
    ],
    *,
    keys_dir: KeysDir = HERE.config / "keys",
) -> None:
    """End a key for good; running edge workers refuse it within 5 s."""
    from edge import keys

    try:
        jti = keys.revoke(keys_dir, key_or_jti)
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(str(exc)) from exc
    print(f"Revoked {jti}", file=sys.stderr)


@key.command(name="list")
def list_keys(*, keys_dir: KeysDir = HERE.config / "keys") -> None:
    """Every key issued here: id, account, expiry, state, and limits and priority if it has any."""
    from edge import keys

    now = datetime.now(UTC)
    for issued in keys.listing(keys_dir):
        expires = datetime.fromtimestamp(issued.expires, UTC)
        state = "revoked" if issued.revoked else "expired" if expires <= now else "good"
        more = [*issued.limits, *([f"priority {issued.priority}"] if issued.priority else [])]
        row = [issued.jti, f"{issued.account:24}", f"{expires:%Y-%m-%d}", state, *more]
        print("  ".join(row))


def main() -> None:
    app(prog_name="edge")


if __name__ == "__main__":
    main()
