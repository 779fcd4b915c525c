"""A key for a caller on this machine, made by `edge key create`, which alone can sign one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


class NoKey(Exception):
    """What `edge key create` said when it made none."""


def create_key(keys_dir: Path, environ: Mapping[str, str], account: str) -> str:
    """A new bearer key for the account. NoKey when the command fails."""
    words = [sys.executable, "-m", "edge", "key", "create", "--account", account]
    done = subprocess.run(
        [*words, "--keys-dir", str(keys_dir)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.split()
    if done.returncode or not lines:
        raise NoKey(f"edge key create failed:\n{done.stderr.strip()}")
    return lines[-1]
