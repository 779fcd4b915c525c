"""The compiler on every kernel, as the command runs it: without a GPU, whatever the environment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"}:
    pytest.skip("Triton's assembler is for Linux", allow_module_level=True)

from unweight.gpu.compiled import Compiled, Job
from unweight.gpu.plans import Launch
from unweight.kernels_check.verdict import judge


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "unweight.kernels_check", *arguments],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},  # which it must not be misled by
    )  # fmt: skip


def verdicts(*arguments: str) -> list[dict[str, Any]]:
    done = check("--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert not any(one["faults"] or one["stack_bytes"] or one["spills"] for one in found)
    return found


def test_the_fused_product_on_hopper() -> None:
    found = verdicts("--fused", "--target", "90")
    assert len(found) >= 9
    for one in found:
        assert any(name.startswith("HGMMA") for name in one["tensor"])
        assert one["load_bits"] == 128
        if "64x16," in one["kernel"] or "64x32," in one["kernel"]:
            assert one["instructions"] <= 5.2
            assert one["alu"] <= 2.3


@pytest.mark.slow
def test_every_kernel_on_every_target() -> None:
    found = verdicts()
    kernels = {one["kernel"].split(",")[0].split(" of ")[0].split(" 1")[0] for one in found}
    assert {"unpack", "rows", "histogram", "pack", "list"} <= kernels
    targets = [one["target"] for one in found]
    assert targets.count("sm_80") == targets.count("sm_100") == 17
    assert targets.count("sm_90") >= 18


def test_a_target_it_does_not_know() -> None:
    done = check("--target", "75")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["kernels_check: --target 75 is not 80, 90 or 100"]


def test_without_triton_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.argv = ['kernels_check'];"
        "from unweight.kernels_check.__main__ import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'edgefire[gpu]'" in line


# --- verdicts on listings made up ----------------------------------------------------------------

JOB = Job(
    kernel="fused", target=90, constants={"SPLIT": 1},
    launch=Launch(block_n=64, block_m=16, warps=4, stages=3, early=False),
)  # fmt: skip


def made(*body: str, stack: int = 0) -> Compiled:
    """A loop of one HGMMA, which is 8 weights of a thread, and `body`."""
    lines = [*body, "HGMMA.64x16x16.F32.BF16 R24, R12, gdesc[UR20], R24", "@P0 BRA 0x0"]
    return Compiled(
        resource_usage=f"REG:74 STACK:{stack} SHARED:0 LOCAL:0",
        sass="\n".join(f"/*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines)),
        shared_bytes=1,
    )


WIDE, ALU = "LDGSTS.E.128 [R1], [R2]", "LOP3.LUT R1, R2, R3, R4, 0xea, !PT"


def test_what_holds() -> None:
    found = judge(JOB, made(WIDE, *[ALU] * 18))
    assert (found.faults, found.alu, found.instructions) == ([], 2.25, 2.62)


@pytest.mark.parametrize(
    ("compiled", "fault"),
    [
        (made(WIDE, stack=8), "spills: 8 bytes of stack"),
        (made(WIDE, "STL [R1], R2"), "spills: 0 bytes of stack, 1 accesses"),
        (made("LDG.E R1, [R2]", WIDE), "loads of [32, 128] bits"),
        (made(ALU), "loads of [] bits"),
        (made(WIDE, *[ALU] * 19), "2.38 ALU instructions a weight, at most 2.3"),
        (made(WIDE, *["IMAD R1, R2, R3, R4"] * 39), "5.25 instructions a weight, at most 5.2"),
    ],
)
def test_what_does_not(compiled: Compiled, fault: str) -> None:
    (found,) = judge(JOB, compiled).faults
    assert found.startswith(fault)


def test_a_product_without_tensor_cores() -> None:
    plain = Compiled(
        resource_usage="REG:1 STACK:0 SHARED:0 LOCAL:0", sass="/*0000*/ EXIT ;", shared_bytes=0
    )
    assert judge(JOB, plain).faults == ["no HGMMA instructions"]
    assert judge(replace(JOB, target=80), plain).faults == ["no HMMA instructions"]
