"""Which processor this is, and with which instructions it computes: figures depend on both.

Linux tells in `/proc/cpuinfo`; elsewhere the name is what Python knows, without instructions.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from routing.preflight import usable_cores

CPUINFO = Path("/proc/cpuinfo")
# As /proc/cpuinfo spells them, the widest first: x86 under "flags", ARM under "Features".
INSTRUCTIONS = {
    "amx_bf16": "AMX BF16",
    "avx512_bf16": "AVX-512 BF16",
    "avx512f": "AVX-512 without BF16",
    "avx2": "AVX2",
    "bf16": "BF16",
    "asimd": "NEON",
}
BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


@dataclass(frozen=True, slots=True)
class Processor:
    """One of this machine's; all of them are taken to be alike."""

    name: str
    flags: frozenset[str]

    @property
    def instructions(self) -> str | None:
        """The widest that it computes with, None where it does not tell."""
        return next((name for flag, name in INSTRUCTIONS.items() if flag in self.flags), None)

    @property
    def computes_bf16(self) -> bool:
        """Whether it multiplies BF16 itself; else BF16 is widened first."""
        return not BF16.isdisjoint(self.flags)


def processor(cpuinfo: Path = CPUINFO) -> Processor:
    """This machine's."""
    if not cpuinfo.exists():
        return Processor(platform.processor() or platform.machine(), frozenset())
    told: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    flags = told.get("flags") or told.get("Features", "")
    return Processor(_name(told), frozenset(flags.split()))


def machine() -> str:
    """The processor, its instructions and how many of its cores may be used."""
    found = processor()
    instructions = f" with {found.instructions}" if found.instructions else ""
    return f"{found.name}{instructions}, {usable_cores()} cores"


def _name(told: dict[str, str]) -> str:
    """With family and model where the name tells no model: virtual machines say "AMD EPYC"."""
    name = told.get("model name") or platform.machine()
    if any(letter.isdigit() for letter in name) or "cpu family" not in told:
        return name
    return f"{name} (family {told['cpu family']}, model {told.get('model', '?')})"
