"""What this machine has, and what of that is too little: said with the line to type.

Standard library only, as it also runs before anything is installed. Changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GB = 10**9
OLDEST, NEWEST = (3, 11), (3, 14)
SMALL_MEMORY_BYTES = 8 * GB  # below: one worker, not four of them
LEAST_MEMORY_BYTES = 2 * GB  # torch, the model and its KV in one worker, the edge and the front
ENVIRONMENT_BYTES = 3 * GB  # .venv with the CPU build of torch, and pip's copies while it unpacks
CUDA_ENVIRONMENT_BYTES = 12 * GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `look` found. None: this system does not say."""

    system: str  # sys.platform: linux, darwin
    python: tuple[int, int]
    modules: frozenset[str]  # of those asked for, the ones there
    free_disk_bytes: int
    free_memory_bytes: int | None
    nvidia: bool  # a driver that answers


@dataclass(frozen=True, slots=True)
class Lack:
    """Something missing, and what to do about it."""

    what: str
    remedy: str


def look(folder: Path) -> Machine:
    """This machine, with the disk that holds `folder` (which need not exist yet)."""
    wanted = ("venv", "ensurepip")
    return Machine(
        system=sys.platform,
        python=sys.version_info[:2],
        modules=frozenset(name for name in wanted if importlib.util.find_spec(name)),
        free_disk_bytes=free_disk_bytes(folder),
        free_memory_bytes=free_memory_bytes(),
        nvidia=nvidia_answers(),
    )


def lacking(machine: Machine, *, disk_bytes: int) -> list[Lack]:
    """What an installation that takes `disk_bytes` cannot do without, and has not."""
    lacks: list[Lack] = []
    if not OLDEST <= machine.python <= NEWEST:
        found = "Python {}.{}".format(*machine.python)
        lacks.append(Lack(f"Python 3.11 to 3.14 (this is {found})", python_line(machine.system)))
    if not {"venv", "ensurepip"} <= machine.modules:
        version = "{}.{}".format(*machine.python)
        lacks.append(Lack("Python's venv module", f"sudo apt install python{version}-venv"))
    if machine.free_disk_bytes < disk_bytes:
        free, need = machine.free_disk_bytes / GB, disk_bytes / GB
        lacks.append(Lack(f"disk: {free:.1f} GB free, {need:.0f} GB needed", "df -h ."))
    memory = machine.free_memory_bytes
    if memory is not None and memory < LEAST_MEMORY_BYTES:
        free, need = memory / GB, LEAST_MEMORY_BYTES / GB
        lacks.append(Lack(f"memory: {free:.1f} GB free, {need:.0f} GB needed", "close programs"))
    return lacks


def python_line(system: str) -> str:
    if system == "darwin":
        return "brew install python@3.13"
    return "sudo apt install python3 python3-venv   (or: make PYTHON=/path/to/python3.13)"


def free_disk_bytes(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def usable_cores() -> int:
    """Cores this process may run on, no more than a container's share of them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    share = cgroup_cores(Path("/sys/fs/cgroup"))
    return cores if share is None else min(cores, share)


def nvidia_answers() -> bool:
    """Whether an NVIDIA driver is here and lists a GPU."""
    return "GPU 0" in _output(["nvidia-smi", "-L"])


def free_memory_bytes() -> int | None:
    """Memory that new processes may take without swapping, also inside a container."""
    if sys.platform == "darwin":
        return macos_free_bytes(_output(["vm_stat"]))
    try:
        free = linux_free_bytes(Path("/proc/meminfo").read_text())
    except OSError:
        return None
    room = cgroup_free_bytes(Path("/sys/fs/cgroup"))
    return free if free is None or room is None else min(free, room)


def linux_free_bytes(meminfo: str) -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def macos_free_bytes(vm_stat: str) -> int | None:
    """Free, inactive, speculative and purgeable pages: what macOS hands out before it swaps."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    kinds = r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\."
    pages = [int(count) for count in re.findall(kinds, vm_stat, re.MULTILINE)]
    return int(page[1]) * sum(pages) if page and pages else None


def cgroup_free_bytes(folder: Path) -> int | None:
    """What a version 2 control group leaves us; its file cache counts as free. None: no limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    return int(limit) - used + (int(cache[1]) if cache else 0)


def cgroup_cores(folder: Path) -> int | None:
    """The time of so many cores a version 2 control group leaves us, rounded up. None: no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


def _output(command: Sequence[str]) -> str:
    """What the command prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
