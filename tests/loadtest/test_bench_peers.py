from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio
import msgspec
import pytest

from loadtest.bench import interleaved, servers
from loadtest.bench.client import Client, Target
from loadtest.bench.interleaved import Record, Run, why
from loadtest.bench.measure import Plan, Served
from loadtest.bench.peers import README, part_name, report
from loadtest.bench.processor import Processor, processor
from loadtest.bench.rounds import Missed, Round
from loadtest.bench.servers import NotUp
from loadtest.bench.streams import BrokenStream
from loadtest.bench.table import with_part
from tests.loadtest.figures import level

SERVED = Served(levels=(level(),), prefills=())


@dataclass(slots=True)
class Fake:
    """A contestant that fails where it is told to."""

    name: str
    version: str = "1"
    bad_starts: tuple[int, ...] = ()  # by count: the first start is 0
    bad_fill: bool = False
    starts: int = 0

    @asynccontextmanager
    async def serving(self, log: Path) -> AsyncGenerator[Target, None]:
        yield Target(url="http://127.0.0.1:1", model="fake")

    async def first_token_s(self, log: Path) -> float:
        self.starts += 1
        if self.starts - 1 in self.bad_starts:
            raise NotUp("ended with exit code 1")
        return 0.5

    async def peak_bytes(self, log: Path) -> int:
        async with anyio.create_task_group():
            if self.bad_fill:
                raise BrokenStream("out of blocks\n  of KV")
        return 3_000_000


async def figures(client: Client, plan: Plan, seed: int) -> Served:
    return SERVED


async def nothing(client: Client, plan: Plan) -> None:
    return None


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *contestants: Fake, rounds: int = 2
) -> Record:
    monkeypatch.setattr(interleaved, "measure", figures)
    monkeypatch.setattr(interleaved, "warm_up", nothing)
    run = Run(
        contestants=contestants,
        plan=Plan(concurrency=(1,), prefill_tokens=()),
        rounds=rounds,
        memory_rounds=1,
        folder=folder,
    )
    return anyio.run(run.measure)


def test_a_server_that_fails_in_a_round_keeps_the_others_and_its_row_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # its first round takes two starts
    weak, well = Fake("weak", bad_starts=(2,)), Fake("well")
    record = measured(monkeypatch, tmp_path, weak, well)
    assert [(one.server, one.round) for one in record.rounds] == [
        ("weak", 0),
        ("well", 0),
        ("well", 1),
    ]
    said = report(record, datetime(2026, 11, 25, tzinfo=UTC), "a machine, 2 cores")
    assert "| weak (1 of 2 rounds) | 7.00 | 0.50 | 3.00 |" in said
    assert "| well | 7.00 (7.00-7.00) | 0.50 (0.50-0.50) | 3.00 |" in said
    assert "\nweak, round 2: figures not measured: NotUp: ended with exit code 1\n" in said


def test_a_server_that_never_ran_has_a_row_without_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = Fake("never", version="9", bad_starts=(0, 1, 2))
    record = measured(monkeypatch, tmp_path, never, Fake("well"))
    said = report(record, datetime(2026, 11, 25, tzinfo=UTC), "a machine, 2 cores")
    assert "| never (0 of 2 rounds) | - | - | - |" in said
    assert "never 9" in said.splitlines()[0]
    assert "Rounds: 2;" in said


def test_a_server_that_fails_when_it_is_filled_keeps_its_other_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = measured(monkeypatch, tmp_path, Fake("small", bad_fill=True), rounds=1)
    assert [one.peak_bytes for one in record.rounds] == [None]
    [missed] = record.missed
    assert (missed.what, missed.why) == ("peak memory", "BrokenStream: out of blocks of KV")


def test_every_round_and_every_failure_is_written_down_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = measured(monkeypatch, tmp_path, Fake("weak", bad_starts=(0,)), rounds=2)
    lines = (tmp_path / "rounds.jsonl").read_bytes().splitlines()
    assert msgspec.json.decode(lines[0], type=Missed) == record.missed[0]
    assert msgspec.json.decode(lines[1], type=Round) == record.rounds[0]


def test_reasons_out_of_groups_of_groups_are_one_line() -> None:
    inner = ExceptionGroup("tasks", [NotUp("exit code 1"), TimeoutError()])
    assert why(ExceptionGroup("", [inner])) == "NotUp: exit code 1; TimeoutError:"
    assert len(why(ExceptionGroup("", [NotUp("x" * 1000)]))) == interleaved.WHY_LETTERS


X86 = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: {name}
flags\t\t: fpu avx2 {flags}

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("flags", "instructions", "bf16"),
    [
        ("fma", "AVX2", False),
        ("avx512f avx512_bf16 fma", "AVX-512 BF16", True),
        ("avx512f", "AVX-512 without BF16", False),
        ("avx512f avx512_bf16 amx_bf16", "AMX BF16", True),
    ],
)
def test_a_processor_is_told_with_its_instructions(
    tmp_path: Path, flags: str, instructions: str, bf16: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86.format(name="AMD EPYC", flags=flags))
    found = processor(file)
    assert found.name == "AMD EPYC (family 25, model 1)"
    assert (found.instructions, found.computes_bf16) == (instructions, bf16)


def test_a_name_that_tells_the_model_stays(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86.format(name="AMD EPYC 7763 64-Core Processor", flags=""))
    assert processor(file).name == "AMD EPYC 7763 64-Core Processor"


def test_arm_lists_its_instructions_under_another_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert processor(file).instructions == "BF16"


def test_a_system_without_cpuinfo_has_a_processor_too(tmp_path: Path) -> None:
    found = processor(tmp_path / "none")
    assert found.instructions is None
    assert not found.computes_bf16
    assert Processor("x", frozenset({"asimd"})).instructions == "NEON"


def test_peers_compute_in_bf16_only_where_the_processor_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "_said", lambda *_: "1.2-3")
    python = tmp_path / "bin" / "python"
    for bf16, name, dtype in ((True, "BF16", "bfloat16"), (False, "FP32", "float32")):
        serve = servers.transformers(python, tmp_path, bf16=bf16)
        vllm = servers.vllm(python, None, tmp_path, bf16=bf16)
        assert serve.words[0] == str(tmp_path / "bin" / "transformers")
        for peer in (serve, vllm):
            assert peer.name.endswith(name)
            assert peer.words[peer.words.index("--dtype") + 1] == dtype
    openvino = servers.openvino(python, tmp_path, tmp_path, threads=2, bf16=False)
    assert openvino.name == "OpenVINO GenAI, FP32 with KV in FP16"
    assert openvino.words[openvino.words.index("--precision") + 1] == "f32"


@pytest.mark.parametrize("flag", ["avx2", "avx512_bf16"])
def test_each_kind_of_processor_has_a_table_of_its_own(flag: str) -> None:
    text, name = README.read_text(), part_name(Processor("one", frozenset([flag])))
    assert with_part(text, name, "figures\n").count("figures\n") == text.count("figures\n") + 1
