"""Have a model of the catalogue on this machine: `infire pull` does it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from routing.catalogue import ModelRow
from routing.paths import model_folder


class PullFailed(Exception):
    """`infire pull` has said why, on standard error."""


def pull_model(row: ModelRow, cache: Path) -> Path:
    """The model's folder under `cache`, made if it is not complete. Raises PullFailed.

    The child's progress bars go to this process's standard error.
    """
    folder = model_folder(cache, row.model)
    command = [sys.executable, "-m", "infire", "pull", "--source", row.source]
    command += ["--into", str(folder)]
    if row.sha256:
        command += ["--sha256", row.sha256]
    if row.model_digest:
        command += ["--model-digest", row.model_digest]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise PullFailed(f"{row.model} could not be fetched (exit code {code})")
    return folder
