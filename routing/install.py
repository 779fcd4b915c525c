"""Make the virtual environment: `python -m routing.install`, as the Makefile runs it.

Standard library only, as it runs before anything is installed. Knows nothing of fleets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from routing.preflight import CUDA_ENVIRONMENT_BYTES, ENVIRONMENT_BYTES, Machine, lacking, look

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).parent.parent


def torch_attempts(machine: Machine, spec: str) -> list[list[str]]:
    """What to hand `pip install` for torch, in order, until one goes well."""
    if spec:
        return [[spec]]
    if machine.system != "linux" or machine.nvidia:
        return [[TORCH]]
    # On Linux plain `torch` brings 3 GB of CUDA libraries, so it is the last resort. The +cpu
    # build is not on PyPI; a configured mirror may have it, else PyTorch's own index has.
    cpu = f"{TORCH}+cpu"
    return [[cpu], [cpu, "--extra-index-url", CPU_INDEX], [TORCH]]


def main(words: Sequence[str]) -> int:
    ask = argparse.ArgumentParser(prog="python -m routing.install", description=__doc__)
    ask.add_argument("--venv", type=Path, default=ROOT / ".venv")
    ask.add_argument("--extras", default="edge,origin", help="of pyproject.toml")
    ask.add_argument("--torch-spec", default="", help="a requirement in place of our choice")
    options = ask.parse_args(words)

    python = options.venv / "bin" / "python"
    fresh = not _runs(python)
    machine = look(options.venv)
    if fresh and _complain(machine):
        return 1
    if fresh:
        _say(f"Making {options.venv}")
        done = subprocess.run([sys.executable, "-m", "venv", "--clear", options.venv], check=False)
        if done.returncode:
            return done.returncode
    if not _has_torch(python) or options.torch_spec:
        if machine.nvidia and not options.torch_spec:
            _say(f"NVIDIA driver found: {TORCH} and its CUDA libraries, about 3.5 GB to download")
        if not _install_first(python, torch_attempts(machine, options.torch_spec)):
            return 1
    _say(f"Installing edgefire[{options.extras}]")
    return 0 if _install_first(python, [["--editable", f"{ROOT}[{options.extras}]"]]) else 1


def _complain(machine: Machine) -> bool:
    """Name what is missing with the line to type; whether anything is."""
    needed = CUDA_ENVIRONMENT_BYTES if machine.nvidia else ENVIRONMENT_BYTES
    lacks = lacking(machine, disk_bytes=needed)
    for lack in lacks:
        _say(f"Missing: {lack.what}\n    {lack.remedy}")
    return bool(lacks)


def _runs(python: Path) -> bool:
    """Whether the environment is there and its Python has not been uninstalled since."""
    try:
        return (
            subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


def _has_torch(python: Path) -> bool:
    look_up = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([python, "-c", look_up], check=False).returncode == 0


def _install_first(python: Path, attempts: Sequence[Sequence[str]]) -> bool:
    """Try each with pip's progress on our standard error; what went wrong is said at the end."""
    quiet = [
        "--disable-pip-version-check",
        "--no-warn-script-location",
        "--root-user-action=ignore",
    ]
    complaints: list[str] = []
    for attempt in attempts:
        with tempfile.TemporaryFile("w+") as said:
            command = [str(python), "-m", "pip", "install", *quiet, *attempt]
            done = subprocess.run(command, stdout=sys.stderr, stderr=said, check=False)
            if done.returncode == 0:
                return True
            said.seek(0)
            complaints.append(f"pip install {' '.join(attempt)}\n{said.read()}")
    _say("\n".join(complaints))
    return False


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
