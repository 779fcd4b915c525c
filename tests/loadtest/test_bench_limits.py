from __future__ import annotations

import pytest

from loadtest.bench.limits import limits, limits_part
from loadtest.bench.measure import Plan, Prefill, Served
from loadtest.bench.roofline import Machine, Model
from loadtest.bench.rounds import Round
from tests.loadtest.figures import level

PLAN = Plan(concurrency=(1, 4), prompt_tokens=10, output_tokens=20, prefill_tokens=(50,))
MODEL = Model(
    layer_weights=900,
    head_weights=100,
    layer_shapes=((30, 30),),
    num_layers=1,
    kv_bytes=4,
    attention_flops=0,
)
BY_MEMORY = Machine(read_rate=1000.0, gemm_rate=1e12)
BY_ARITHMETIC = Machine(read_rate=1e12, gemm_rate=1000.0, gemm_dtype="FP32")


def a_round(server: str, rate: float, *, ours: bool) -> Round:
    prefills = (Prefill(prompt_tokens=50, rate=rate, requests=1),)
    return Round(
        server=server,
        version="1",
        ours=ours,
        round=0,
        served=Served(levels=(level(1, rate), level(4, rate)), prefills=prefills),
        start_s=1.0,
    )


def test_one_stream_reads_the_weights_and_its_kv_once_a_token() -> None:
    rates = {one.title: one.rate for one in limits(PLAN, MODEL, BY_MEMORY)}
    # 1,000 weights; KV of the prompt and half of the answer
    assert rates["1 stream, 2 bytes a weight"] == pytest.approx(1000 / (2000 + 20 * 4))
    assert rates["1 stream, 1.5 bytes a weight"] == pytest.approx(1000 / (1500 + 20 * 4))


def test_many_streams_take_their_prompts_and_all_steps_but_the_first() -> None:
    rates = {one.title: one.rate for one in limits(PLAN, MODEL, BY_ARITHMETIC)}
    prompt_s, step_s = (10 * 2 * 900 + 2 * 100) / 1000, 4 * 2 * 1000 / 1000
    assert rates["4 streams"] == pytest.approx(4 * 20 / (4 * prompt_s + 19 * step_s))
    assert rates["prefill 50"] == pytest.approx(50 / ((50 * 2 * 900 + 2 * 100) / 1000))


def test_the_table_says_what_ours_reached_and_leaves_peers_out() -> None:
    limit = limits(PLAN, MODEL, BY_ARITHMETIC)[0].rate
    assert limit is not None
    rounds = [a_round("ours", limit / 4, ours=True), a_round("peer", limit, ours=False)]
    lines = limits_part(rounds, PLAN, MODEL, BY_ARITHMETIC).splitlines()
    assert lines[0].count("|") == lines[2].count("|")
    assert lines[3].startswith("| ours | 25 % | 25 % |")
    assert not any("peer" in line for line in lines)
    assert "torch's FP32 GEMM: 0 GFLOP/s" in lines[-1]


def test_without_torch_what_multiplying_limits_is_left_out() -> None:
    machine = Machine(read_rate=1000.0, gemm_rate=None)
    part = limits_part([a_round("ours", 1.0, ours=True)], PLAN, MODEL, machine)
    assert part.splitlines()[2].endswith("| - |")
    assert part.splitlines()[3].endswith("| - |")
    assert "GEMM: not measured" in part


def test_of_two_measurements_each_figure_is_the_better() -> None:
    slow = Machine(read_rate=3.0, gemm_rate=5.0, gemm_dtype="FP32")
    fast = Machine(read_rate=2.0, gemm_rate=7.0, gemm_dtype="BF16")
    better = Machine(read_rate=3.0, gemm_rate=7.0, gemm_dtype="BF16")
    assert slow.or_better(fast) == fast.or_better(slow) == better
    assert Machine(read_rate=1.0, gemm_rate=None).or_better(fast) == fast
