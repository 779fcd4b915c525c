"""`python -m loadtest.bench.embeddings --model-dir DIR`: vectors, ours beside transformers.

The same texts, of random lengths, in one process with the same threads: as our engine computes
them, and as `transformers` does, sorted by length and padded in batches of 32, which is what
sentence-transformers does. In turn; both must give the same vectors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModel

from infire.embed import EmbedEngine
from infire.load_encoder import load_encoder
from infire.notes import Embedded, EmbedTexts
from loadtest.bench.processor import machine
from loadtest.bench.table import markdown, number, spread

BATCH = 32  # texts, as sentence-transformers has it
FIRST_ID, LAST_ID, BEGIN, END = 1000, 29_000, 101, 102  # of BERT's vocabulary
LEAST_COSINE = 0.9999
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Texts = list[list[int]]
Vectors = Callable[[Texts], np.ndarray]


def texts_of(count: int, low: int, high: int, seed: int) -> Texts:
    """Token ids, with the model's special tokens around."""
    rng = random.Random(seed)

    def one() -> list[int]:
        length = rng.randint(low, high) - 2
        return [BEGIN, *(rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)), END]

    return [one() for _ in range(count)]


def ours(engine: EmbedEngine) -> Vectors:
    """By an engine, from request to answer."""

    def vectors(texts: Texts) -> np.ndarray:
        engine.do(EmbedTexts(request_id="bench", texts=tuple(map(tuple, texts))))
        while results := engine.step():
            for answer in results.answers:
                assert isinstance(answer, Embedded), answer
                return np.frombuffer(answer.vectors, np.float32).reshape(len(texts), -1)
        raise AssertionError("no answer")

    return vectors


def theirs(model: torch.nn.Module) -> Vectors:
    """By `transformers`, padded."""

    def vectors(texts: Texts) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        found: list[np.ndarray] = [np.empty(0)] * len(texts)
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            longest = len(texts[some[0]])
            ids = torch.zeros(len(some), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, at in enumerate(some):
                ids[row, : len(texts[at])] = torch.tensor(texts[at])
                mask[row, : len(texts[at])] = 1
            with torch.inference_mode():
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
                weights = mask.unsqueeze(-1)
                means = ((hidden * weights).sum(1) / weights.sum(1)).numpy()
            for row, at in enumerate(some):
                found[at] = means[row]
        return np.stack(found)

    return vectors


def timed(vectors: Vectors, texts: Texts) -> tuple[float, np.ndarray]:
    began = perf_counter()
    found = vectors(texts)
    return perf_counter() - began, found


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / lengths).min())


@app.command(help=__doc__)
def run(
    *,
    model_dir: Annotated[Path, typer.Option(help="Made by `fleet pull`.", file_okay=False)],
    rounds: Annotated[int, typer.Option(min=3)] = 21,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    encoder = load_encoder(model_dir, device="cpu", dtype="auto", threads=threads)
    both = {
        "ours": ours(EmbedEngine(encoder.model, max_batch_tokens=8192)),
        "transformers": theirs(AutoModel.from_pretrained(model_dir).eval()),
    }
    rows = []
    for count, low, high in ((1, 8, 32), (1, 200, 256), (32, 8, 32), (32, 8, 256), (100, 8, 256)):
        seconds: dict[str, list[float]] = {name: [] for name in both}
        tokens = [0] * rounds
        for number_of_round in range(rounds):
            texts = texts_of(count, low, high, number_of_round)
            tokens[number_of_round] = sum(map(len, texts))
            made = {}
            for name in sorted(both, reverse=bool(number_of_round % 2)):
                took, made[name] = timed(both[name], texts)
                seconds[name].append(took)
            worst = least_cosine(made["ours"], made["transformers"])
            assert worst > LEAST_COSINE, worst
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
        rows.append(
            [
                f"{count} of {low} to {high} tokens",
                *(spread([1000 * it for it in seconds[name]]) for name in both),
                number(median(n / s for n, s in zip(tokens, seconds["ours"], strict=True))),
                spread(ratios),
            ]
        )
    heads = ["texts", "ours, ms", "transformers, ms", "ours, tokens/s", "as fast, times"]
    typer.echo(markdown(heads, rows))
    typer.echo(
        f"{machine()}; {threads} threads, FP32; {rounds} rounds in turn: median (least-most)."
    )


if __name__ == "__main__":
    app()
