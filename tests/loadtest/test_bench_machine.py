from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.bench.engine_runs import Failed, Trace
from loadtest.bench.memory import pss_bytes, tree, watch_memory
from loadtest.bench.roofline import Machine, read_model
from loadtest.bench.words import WORDS, prompt

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")


def process(proc: Path, pid: int, parent: int, pss_kb: int | None) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1\n")
    if pss_kb is not None:
        (folder / "smaps_rollup").write_text(f"Rss: 999 kB\nPss: {pss_kb} kB\nPss_Anon: 7 kB\n")


def test_memory_is_that_of_the_process_and_all_that_it_started(tmp_path: Path) -> None:
    for pid, parent, pss_kb in (
        (10, 1, 5),
        (20, 10, 7),
        (30, 20, 11),
        (40, 1, 1000),
        (50, 10, None),
    ):
        process(tmp_path, pid, parent, pss_kb)
    assert sorted(tree(10, tmp_path)) == [10, 20, 30, 50]
    assert pss_bytes(10, tmp_path) == 1024 * (5 + 7 + 11)  # 50 is gone, 40 is a stranger's


@linux
def test_a_peak_is_seen_though_it_is_over() -> None:
    code = (
        "import sys; b = bytearray(64 << 20); print(flush=True); input(); del b; print(flush=True)"
    )
    words = [sys.executable, "-c", code + "; input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        with watch_memory(child.pid) as peak:
            while peak.pss_bytes < 64 << 20:
                os.sched_yield()
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        assert peak.pss_bytes > pss_bytes(child.pid)
        child.kill()


def test_a_models_costs_are_read_from_its_folder(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    shapes = {"model.embed_tokens.weight": [100, 8], "model.norm.weight": [8]}
    shapes |= {f"model.layers.{at}.mlp.up.weight": [16, 8] for at in range(3)}
    header = json.dumps(
        {"__metadata__": {}} | {n: {"shape": s} for n, s in shapes.items()}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    model = read_model(tmp_path)
    assert (model.layer_weights, model.head_weights, model.layer_shapes) == (384, 800, ((16, 8),))
    assert model.kv_bytes == 2 * 2 * 2 * 2 * 3  # BF16, keys and values, heads, size, layers
    assert model.attention_flops == 4 * 4 * 2 * 3

    by_memory = Machine(read_rate=1000.0, gemm_rate=1e12)
    assert model.step_s(by_memory, batch=1, context=10, weight_bytes=2.0) == (2 * 1184 + 480) / 1000
    by_arithmetic = Machine(read_rate=1e12, gemm_rate=1000.0)
    step_s = model.step_s(by_arithmetic, batch=5, context=10, weight_bytes=2.0)
    assert step_s == 5 * (2 * 1184 + 10 * 96) / 1000
    assert model.prefill_s(by_arithmetic, 3) == (3 * 768 + 1600 + 6 * 96) / 1000


def test_decoding_counts_from_the_last_first_id_to_the_first_end() -> None:
    trace = Trace(0.0)
    trace.bursts.extend([(1.0, "a", 1), (2.0, "a", 1), (2.0, "b", 1), (3.0, "a", 2), (3.0, "b", 1)])
    trace.bursts.extend([(4.0, "a", 1), (4.0, "b", 1), (5.0, "b", 1)])
    trace.ended.update({"a": 4.0, "b": 5.0})
    assert trace.first == 1.0
    assert trace.steady_rate() == (2 + 1 + 1 + 1) / 2


def test_sequences_that_never_decoded_together_are_no_measurement() -> None:
    trace = Trace(0.0, [(1.0, "a", 1), (2.0, "b", 1)], {"a": 1.0, "b": 2.0})
    with pytest.raises(Failed, match="longer outputs"):
        trace.steady_rate()


def test_prompts_have_their_length_and_differ() -> None:
    for length in (1, 63, 1000):
        words = prompt(5, length).split(" ")
        assert len(words) == length
        assert set(words) <= set(WORDS)
        assert prompt(5, length) == " ".join(words)
    assert len({prompt(seed, 100) for seed in range(1000)}) == 1000
