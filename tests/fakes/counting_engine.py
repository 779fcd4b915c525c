"""An engine process that counts: the flags and the notes of `infire serve`, without a model.

    python tests/fakes/counting_engine.py --fd N --kv-tokens 16384 ... [--step-s 0.01]

Its model is `CountingRunner` (see there what it answers) behind the real scheduler, engine and
loop. `--model-dir` may be a folder of `model_folder.make_counting_folder`, whose digest and
context window it then reports, or be missing. Starts without torch, in a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.notes import Hello
from infire.scheduler import Scheduler
from infire.serve import serve_process
from infire.tier_files import make_tiers
from tests.fakes.runner import VOCABULARY, CountingRunner, counting_layout

NUM_SPECIAL = 3  # as in `model_folder`: ids a prompt may hold, but no answer
NO_WINDOW = 1 << 20  # tokens, when no folder says


def counting_engine(
    *,
    model: str = "counting",
    model_dir: Path | None = None,
    kv_tokens: int = 16384,
    block_tokens: int = 16,
    max_step_tokens: int = 512,
    max_running: int = 64,
    step_s: float = 0.0,
    num_heads: int = 1,
    rank: tuple[int, int] = (0, 1),
    host_cache_bytes: int = 0,
    disk_cache_dir: Path | None = None,
    disk_cache_bytes: int = 1 << 30,
) -> tuple[Hello, Engine]:
    """A counting engine, and what it says of itself; also for tests in one process.

    Its KV is that of one rank of several, with its share of the model's `num_heads`.
    """
    began = time.monotonic()
    digest = _read(model_dir, "edgefire.json").get("model_digest", "counting")
    window = _read(model_dir, "config.json").get("max_position_embeddings", NO_WINDOW)
    layout = counting_layout(
        block_tokens=block_tokens, model_digest=digest, num_heads=num_heads
    ).cut(tp_rank=rank[0], tp_size=rank[1])
    num_blocks = kv_tokens // block_tokens
    limits = Limits(
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        context_window=window,
        vocab_size=VOCABULARY + NUM_SPECIAL,
    )
    tiers = make_tiers(
        layout, host_bytes=host_cache_bytes, folder=disk_cache_dir, disk_bytes=disk_cache_bytes
    )
    scheduler = Scheduler(
        [BlockPool(num_blocks)],
        layout.groups,
        limits,
        model_digest=layout.model_digest,
        tier=tiers,
    )
    hello = Hello(
        model=model,
        model_digest=digest,
        layout=layout,
        context_window=window,
        max_sequence_tokens=scheduler.max_sequence_tokens,
        vocab_size=VOCABULARY + NUM_SPECIAL,
        device="cpu",
        dtype=layout.dtype,
        threads=1,
        load_s=time.monotonic() - began,
    )
    runner = CountingRunner(layout, [num_blocks], step_s=step_s)
    return hello, Engine(scheduler, runner, tiers=tiers)


def _read(model_dir: Path | None, name: str) -> dict:
    path = model_dir / name if model_dir else None
    return json.loads(path.read_text()) if path and path.exists() else {}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("command", nargs="?", choices=["serve"])
    flags.add_argument("--fd", type=int, required=True)
    flags.add_argument("--model", default="counting")
    flags.add_argument("--model-dir", type=Path)
    flags.add_argument("--device", default="cpu", help="ignored")
    flags.add_argument("--dtype", default="float32", help="ignored")
    flags.add_argument("--threads", type=int, default=1, help="ignored")
    flags.add_argument("--kv-tokens", type=int, default=16384)
    flags.add_argument("--block-tokens", type=int, default=16)
    flags.add_argument("--max-step-tokens", type=int, default=512)
    flags.add_argument("--max-running", type=int, default=64)
    flags.add_argument("--step-s", type=float, default=0.0, help="how long a step takes")
    flags.add_argument("--heads", type=int, default=1, help="KV heads of the model")
    flags.add_argument("--tp-rank", type=int, default=0)
    flags.add_argument("--tp-size", type=int, default=1)
    flags.add_argument("--host-cache-bytes", type=int, default=0)
    flags.add_argument("--disk-cache-dir", type=Path)
    flags.add_argument("--disk-cache-bytes", type=int, default=1 << 30)
    given = flags.parse_args()

    def load() -> tuple[Hello, Engine]:
        return counting_engine(
            model=given.model,
            model_dir=given.model_dir,
            kv_tokens=given.kv_tokens,
            block_tokens=given.block_tokens,
            max_step_tokens=given.max_step_tokens,
            max_running=given.max_running,
            step_s=given.step_s,
            host_cache_bytes=given.host_cache_bytes,
            disk_cache_dir=given.disk_cache_dir,
            disk_cache_bytes=given.disk_cache_bytes,
            num_heads=given.heads,
            rank=(given.tp_rank, given.tp_size),
        )

    serve_process(given.fd, load)


if __name__ == "__main__":
    main()
