"""What the assembler made of a kernel, read from text. Runs nothing; knows no kernel.

Text is that of `cuobjdump -sass` and of `cuobjdump --dump-resource-usage`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What NVIDIA's profiler counts to the ALU pipe: integers, logic, comparisons, selections. IMAD runs
# on the FMA pipe, instructions that begin with U on the uniform datapath: neither competes with it.
_ALU = re.compile(
    r"(LOP3|PLOP3|LOP|PRMT|SHF|SHL|SHR|IADD3|IADD|VIADD|LEA|ISETP|FSETP|HSETP2|SEL|FSEL|IMNMX|VIMNMX|"
    r"FMNMX|BMSK|SGXT|VABSDIFF|IABS|ICMP|P2R|R2P)(\.|$)"
)
_TENSOR = re.compile(r"(HGMMA|HMMA|QGMMA|IGMMA|UTC\w*MMA)(\.|$)")
_LOAD = re.compile(r"(LDG|LDGSTS)\.")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\.")


class NotUnderstood(ValueError):
    """Text that is not what these tools print, or a kernel without the loop that is looked for."""


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    name: str  # with its modifiers: LDGSTS.E.BYPASS.128
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch to an address."""
        found = re.match(r"(?:\w+, )?(?:`\(\S+\)|0x([0-9a-f]+))$", self.operands.strip())
        return int(found[1], 16) if self.name.startswith("BRA") and found and found[1] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    registers: int
    stack_bytes: int
    local_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Instructions of one pass of a loop, as many as one thread executes."""

    total: int
    alu: int
    imad: int
    tensor: int
    load_bits: tuple[int, ...]  # of each load from memory


def resources(text: str) -> Resources:
    """Raises `NotUnderstood`."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise NotUnderstood(f"no resource usage: {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers=registers, stack_bytes=stack, local_bytes=local)


def instructions(text: str) -> list[Instruction]:
    """In order. Raises `NotUnderstood` if there are none."""
    found = [
        Instruction(int(match[1], 16), match[2], match[3].strip())
        for match in map(_LINE.match, text.splitlines())
        if match
    ]
    if not found:
        raise NotUnderstood(f"no instructions: {text[:200]!r}")
    return found


def spills(code: Sequence[Instruction]) -> int:
    """Loads and stores of local memory."""
    return sum(one.name.startswith(("LDL", "STL")) for one in code)


def tensor_core(code: Sequence[Instruction]) -> list[str]:
    """Instructions of tensor cores, each kind once."""
    return sorted({one.name for one in code if _TENSOR.match(one.name)})


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The loop with most tensor-core instructions; of loops around each other, the inner one."""
    best: list[Instruction] = []
    most = 0
    for one in code:
        if one.target is None or one.target > one.address:
            continue
        body = [other for other in code if one.target <= other.address <= one.address]
        tensor = sum(bool(_TENSOR.match(other.name)) for other in body)
        if tensor > most or (tensor == most and 0 < len(body) < len(best)):
            best, most = body, tensor
    if not best:
        raise NotUnderstood("no loop has tensor-core instructions")
    return best


def counted(body: Sequence[Instruction]) -> Loop:
    """What a loop is made of."""
    return Loop(
        total=sum(not one.name.startswith("NOP") for one in body),
        alu=sum(bool(_ALU.match(one.name)) for one in body),
        imad=sum(one.name.startswith("IMAD") for one in body),
        tensor=sum(bool(_TENSOR.match(one.name)) for one in body),
        load_bits=tuple(_bits(one.name) for one in body if _LOAD.match(one.name)),
    )


def weights_of_hgmma(body: Sequence[Instruction], num_rows: int) -> float:
    """Weights of one thread in one pass, if weights are the left operand of every HGMMA, which a
    group of 128 threads executes together: 64 x 16 of them, times as many of `num_rows` columns as
    it is wide. Raises `NotUnderstood`."""
    shapes = [_HGMMA.match(one.name) for one in body if one.name.startswith("HGMMA")]
    widths = {int(shape[1]) for shape in shapes if shape and shape[2] == "16"}
    if None in shapes or len(widths) != 1:
        raise NotUnderstood("the loop multiplies by other instructions than one HGMMA.64xNx16")
    return len(shapes) * 64 * 16 / 128 * widths.pop() / num_rows


def _bits(name: str) -> int:
    found = [int(part) for part in name.split(".") if part in {"64", "128"}]
    small = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
    return found[0] if found else next((small[p] for p in name.split(".") if p in small), 32)
