"""Where a node keeps things. The environment is passed in: only `__main__.py` files read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    config: Path  # keys, revocations: keep
    cache: Path  # models, tokenizers: may be deleted
    state: Path  # running fleets: sockets, logs, process ids; and usage, which is to be kept


def paths(environ: Mapping[str, str]) -> Paths:
    """Under EDGEFIRE_HOME if set, else where the XDG base directory specification says."""
    if home := environ.get("EDGEFIRE_HOME"):
        root = Path(home).expanduser().absolute()
        return Paths(config=root / "config", cache=root / "cache", state=root / "state")
    user = Path(environ.get("HOME", "~")).expanduser()

    def place(variable: str, default: str) -> Path:
        return Path(environ.get(variable) or user / default) / "edgefire"

    return Paths(
        config=place("XDG_CONFIG_HOME", ".config"),
        cache=place("XDG_CACHE_HOME", ".cache"),
        state=place("XDG_STATE_HOME", ".local/state"),
    )


def model_folder(cache: Path, model: str) -> Path:
    """The Hugging Face style folder of a pulled model."""
    return cache / "models" / model.replace("/", "--")
