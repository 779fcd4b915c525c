"""Compile the kernels on first use, as Triton does, into a cache that later starts find them in.

Knows a compiler and a folder, and nothing of what is compiled.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from infire.once import make_once

COMPILERS = ("g++", "c++", "clang++")
NATIVE = "native"
_SOURCES = Path(__file__).parent
# gnu++20 for the vector extensions; contracted, as `fma` in simd.h is a product and a sum where
# there is no name for it. GCC's own AVX-512 header makes it warn of what is not initialised.
# Weights are vectors to one line and single numbers to the next, so nothing follows from types.
_FLAGS = (
    *("-O3", "-std=gnu++20", "-ffp-contract=fast", "-fno-strict-aliasing"),
    *("-fPIC", "-fvisibility=hidden", "-pthread"),
)
_QUIET = ("-w",)
_COMPILE_S = 300.0


class CannotBuild(RuntimeError):
    """No kernels on this machine, and why."""


def library_path(cache: Path, *, march: str = NATIVE) -> Path:
    """The compiled kernels, out of `cache` or newly made there. Raises `CannotBuild`.

    Safe to call from several processes at once: one compiles, the others wait. `march` is what
    the compiler is told to compile for; "native" is this machine, which the cache tells apart by
    what its processor can do, so that a cache in a shared home folder serves several kinds.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotBuild(f"none of {', '.join(COMPILERS)} is on the PATH")
    flags = (*_FLAGS, *_target(march))
    path = cache / "kernels" / _key(compiler, flags) / "libinfire.so"
    try:
        return make_once(path, lambda made: _compile(compiler, flags, made))
    except OSError as error:
        raise CannotBuild(f"{path} cannot be written: {error}") from error


def _target(march: str) -> tuple[str, ...]:
    """Clang on ARM knows the machine as a processor, not as an architecture."""
    if march == NATIVE and platform.machine() in ("arm64", "aarch64"):
        return ("-mcpu=native",)
    return (f"-march={march}",)


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the compiler, its flags and the machine."""
    about = [_ask(compiler, "--version"), *flags, platform.machine(), _processor()]
    digest = sha256("\0".join(about).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{' '.join(command)} failed: {error}") from error


def _processor() -> str:
    """Which instructions the processor has, as the system tells it."""
    if sys.platform == "darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, flags: tuple[str, ...], made: Path) -> None:
    """Each source by itself, as many at once as there are cores."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [made.with_name(f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        _run(compiler, *flags, *_QUIET, "-c", str(source), "-o", str(to))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, sources, objects))
    _run(compiler, *flags, "-shared", *map(str, objects), "-o", str(made))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"compiling took longer than {_COMPILE_S:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CannotBuild(f"{command[0]} failed: {lines[0][:300]}")
