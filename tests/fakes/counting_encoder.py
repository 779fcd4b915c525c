"""A model of vectors that a person can compute: three numbers of each text, and its engine.

    python tests/fakes/counting_encoder.py --fd N --max-step-tokens 512 ... [--step-s 0.01]

A text's vector is (its sum of ids, its number of ids, 1 by `mean` or 2 by `cls`). Starts without
torch, in a fraction of a second.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infire.embed import EmbedEngine
from infire.kv_layout import KVLayout
from infire.notes import Hello, Pooling
from infire.serve import serve_process

VOCABULARY = 50_000
CONTEXT_WINDOW = 40
WIDTH = 3


class CountingEncoder:
    """An `infire.embed.Model`."""

    width = WIDTH
    pooling: Pooling = "mean"
    vocab_size = VOCABULARY
    context_window = CONTEXT_WINDOW

    def __init__(self, step_s: float = 0.0) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self._step_s = step_s

    def vectors(self, texts: Sequence[Sequence[int]], poolings: Sequence[Pooling]) -> list[bytes]:
        self.batches.append([tuple(ids) for ids in texts])
        time.sleep(self._step_s)
        return [vector(ids, how) for ids, how in zip(texts, poolings, strict=True)]


def vector(ids: Sequence[int], pooling: Pooling = "mean") -> bytes:
    return struct.pack("<3f", sum(ids), len(ids), 1 if pooling == "mean" else 2)


def counting_encoder(
    *, model: str = "vectors", max_step_tokens: int = 512, step_s: float = 0.0
) -> tuple[Hello, EmbedEngine]:
    """An engine of vectors, and what it says of itself."""
    encoder = CountingEncoder(step_s)
    hello = Hello(
        model=model,
        model_digest="vectors",
        layout=KVLayout(groups=(), dtype="float32", model_digest="vectors"),
        context_window=CONTEXT_WINDOW,
        max_sequence_tokens=CONTEXT_WINDOW,
        vocab_size=VOCABULARY,
        device="cpu",
        dtype="float32",
        threads=1,
        load_s=0.0,
        task="text-embeddings",
    )
    return hello, EmbedEngine(encoder, max_batch_tokens=max_step_tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model", default="vectors")
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--step-s", type=float, default=0.0)
    flags, _ = parser.parse_known_args()
    serve_process(
        flags.fd,
        lambda: counting_encoder(
            model=flags.model, max_step_tokens=flags.max_step_tokens, step_s=flags.step_s
        ),
    )


if __name__ == "__main__":
    main()
