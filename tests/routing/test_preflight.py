"""What a machine lacks, and which torch it gets. Nothing here depends on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from routing.install import CPU_INDEX, torch_attempts
from routing.preflight import (
    GB,
    Machine,
    cgroup_cores,
    cgroup_free_bytes,
    free_disk_bytes,
    lacking,
    linux_free_bytes,
    look,
    macos_free_bytes,
    usable_cores,
)

GOOD = Machine(
    system="linux",
    python=(3, 12),
    modules=frozenset({"venv", "ensurepip"}),
    free_disk_bytes=10 * GB,
    free_memory_bytes=16 * GB,
    nvidia=False,
)

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                            2000.
Pages speculative:                          300.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                             40.
"""


def test_a_good_machine_lacks_nothing() -> None:
    assert lacking(GOOD, disk_bytes=3 * GB) == []
    assert lacking(replace(GOOD, free_memory_bytes=None), disk_bytes=3 * GB) == []


@pytest.mark.parametrize(
    ("machine", "what", "remedy"),
    [
        (replace(GOOD, python=(3, 10)), "this is Python 3.10", "sudo apt install python3"),
        (replace(GOOD, python=(3, 15)), "this is Python 3.15", "make PYTHON="),
        (replace(GOOD, python=(3, 9), system="darwin"), "3.11 to 3.14", "brew install python@3.13"),
        (replace(GOOD, modules=frozenset({"venv"})), "venv", "sudo apt install python3.12-venv"),
        (replace(GOOD, free_disk_bytes=GB), "disk: 1.0 GB free, 3 GB needed", "df -h"),
        (replace(GOOD, free_memory_bytes=GB), "memory: 1.0 GB free", "close"),
    ],
)
def test_what_is_missing_is_named_with_the_line_to_type(
    machine: Machine, what: str, remedy: str
) -> None:
    (lack,) = lacking(machine, disk_bytes=3 * GB)
    assert what in lack.what
    assert remedy in lack.remedy


def test_linux_says_what_is_available() -> None:
    assert linux_free_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2 * 2**20
    assert linux_free_bytes("MemTotal: 9 kB\n") is None


def test_macos_counts_pages_it_would_hand_out() -> None:
    assert macos_free_bytes(VM_STAT) == 16384 * (10000 + 2000 + 300 + 40)
    assert macos_free_bytes("") is None


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert cgroup_free_bytes(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_free_bytes(tmp_path) is None


@pytest.mark.parametrize(
    ("said", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("5000 100000", 1)],
)
def test_a_container_has_the_cores_of_its_share(
    tmp_path: Path, said: str, cores: int | None
) -> None:
    assert cgroup_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text(said)
    assert cgroup_cores(tmp_path) == cores


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    machine = look(tmp_path)
    assert machine.free_memory_bytes is None or machine.free_memory_bytes > 0
    assert usable_cores() >= 1


def test_torch_for_a_linux_machine_without_gpu_never_starts_with_the_cuda_build() -> None:
    assert torch_attempts(GOOD, "") == [
        ["torch==2.13.0+cpu"],
        ["torch==2.13.0+cpu", "--extra-index-url", CPU_INDEX],
        ["torch==2.13.0"],
    ]


def test_torch_with_a_driver_on_macos_and_as_asked() -> None:
    assert torch_attempts(replace(GOOD, nvidia=True), "") == [["torch==2.13.0"]]
    assert torch_attempts(replace(GOOD, system="darwin"), "") == [["torch==2.13.0"]]
    assert torch_attempts(GOOD, "torch==2.9.1") == [["torch==2.9.1"]]
