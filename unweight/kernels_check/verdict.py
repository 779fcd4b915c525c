"""What must hold of a compiled kernel, and what does not. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unweight.gpu import disassembly as sass
from unweight.gpu.compiled import Compiled, Job, compiled

MOST_ALU = 2.3
MOST_INSTRUCTIONS = 5.2
BOUND_BY_MEMORY = 32  # rows of x up to which the product is
_EXPECTED = {80: "HMMA", 90: "HGMMA", 100: "UTC"}  # how tensor-core instructions are called


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one kernel on one target."""

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    tensor: list[str]
    load_bits: int | None = None  # the widest of the main loop; of what is counted only
    alu: float | None = None  # a weight
    imad: float | None = None
    instructions: float | None = None
    faults: list[str]


def check(job: Job) -> Verdict:
    """Compile one, and read what came out."""
    return judge(job, compiled(job))


def judge(job: Job, made: Compiled) -> Verdict:
    """What holds of it, and what does not."""
    used = sass.resources(made.resource_usage)
    code = sass.instructions(made.sass)
    tensor = sass.tensor_core(code)
    faults = []
    if used.stack_bytes or used.local_bytes or sass.spills(code):
        faults.append(f"spills: {used.stack_bytes} bytes of stack, {sass.spills(code)} accesses")
    if job.launch and not any(name.startswith(_EXPECTED[job.target]) for name in tensor):
        faults.append(f"no {_EXPECTED[job.target]} instructions")
    counts: dict[str, float] = {}
    if job.num_rows and not faults:
        body = sass.main_loop(code)
        loop, weights = sass.counted(body), sass.weights_of_hgmma(body, job.num_rows)
        counts = {
            "alu": round(loop.alu / weights, 2),
            "imad": round(loop.imad / weights, 2),
            "instructions": round(loop.total / weights, 2),
            "load_bits": min(loop.load_bits, default=0),
        }
        if counts["load_bits"] < 128:
            faults.append(f"loads of {sorted(set(loop.load_bits))} bits")
        faults += _too_many(counts) if job.num_rows <= BOUND_BY_MEMORY else []
    return Verdict(
        kernel=job.name,
        target=f"sm_{job.target}",
        registers=used.registers,
        shared_bytes=made.shared_bytes,
        stack_bytes=used.stack_bytes,
        spills=sass.spills(code),
        tensor=tensor,
        faults=faults,
        **counts,  # type: ignore[arg-type]
    )


def _too_many(counts: Mapping[str, float]) -> list[str]:
    limits = (
        ("alu", "ALU instructions", MOST_ALU),
        ("instructions", "instructions", MOST_INSTRUCTIONS),
    )
    return [
        f"{counts[key]} {words} a weight, at most {most}"
        for key, words, most in limits
        if counts[key] > most
    ]
