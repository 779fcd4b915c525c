"""Have a model of the catalogue on this machine: `infire pull` does it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from routing.catalogue import ModelRow
from routing.paths import model_folder

_STDERR = 2  # the process's own, whatever sys.stderr is
# After ^C a terminal has told the child too, and it cleans up; else it is told, then killed.
_LEAVES_S = 1.0
_STOPS_S = 3.0


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
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR) as child:
        try:
            code = child.wait()
        finally:
            if child.poll() is None:  # we are interrupted
                _stop(child)
    if code:
        raise PullFailed(f"{row.model} could not be fetched (exit code {code})")
    return folder


def _stop(child: subprocess.Popen[bytes]) -> None:
    for act, patience_s in ((None, _LEAVES_S), (child.terminate, _STOPS_S), (child.kill, None)):
        if act is not None:
            act()
        try:
            child.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
