"""Loaded models, and whole answers out of them: through the scheduler and engine as in a fleet."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infire.__main__ import default_cache
from infire.admission import Limits
from infire.batch import build
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.load import load_model
from infire.loaded import Loaded
from infire.native.load import load_native
from infire.plan import Row
from infire.request import SamplingParams, Sequence
from infire.scheduler import Scheduler

_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "kv_tokens": 4096,
    "block_tokens": 16,
    "max_running": 16,
    "max_step_tokens": 512,
    "threads": 1,  # what else runs here must not make it many times slower
}


def loaded(folder: Path, **settings: Any) -> Loaded:
    return load_model(folder, **{**_SETTINGS, **settings})


def loaded_native(folder: Path, *, march: str = "native", **settings: Any) -> Loaded:
    """With the compiled kernels, which are kept in the user's cache."""
    chosen = {"weights": "u12", "cache": default_cache(os.environ), **_SETTINGS, **settings}
    del chosen["device"], chosen["dtype"]
    return load_native(folder, march=march, **chosen)


def engine(
    model: Loaded, *, max_step_tokens: int = 512, num_blocks: Seq[int] | None = None
) -> Engine:
    """A new engine over a model; one at a time, as they use the same KV."""
    limits = Limits(
        max_step_tokens=max_step_tokens,
        max_running=16,
        context_window=model.context_window,
        vocab_size=model.vocab_size,
    )
    pools = [BlockPool(count) for count in num_blocks or model.num_blocks]
    model.runner.tags.reset()
    return Engine(Scheduler(pools, model.layout.groups, limits), model.runner)


def sequence(
    request_id: str, prompt: Seq[int], max_tokens: int, *, hold: bool = False, **sampling: Any
) -> Sequence:
    """Greedy unless a temperature is given."""
    knobs = {"temperature": 0.0, "seed": 7} | sampling
    return Sequence(
        request_id=request_id,
        model="test",
        token_ids=list(prompt),
        num_prompt=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **knobs),
        hold=hold,
    )


def neighbours(count: int, vocabulary: int, max_tokens: int) -> list[Sequence]:
    """Requests of all kinds and lengths, to be computed together with the one that is watched."""
    chance = random.Random(3)
    return [
        sequence(
            f"neighbour {n}",
            [chance.randrange(vocabulary) for _ in range(chance.choice((1, 5, 40, 150)))],
            chance.randint(1, max_tokens),
            temperature=chance.choice((0.0, 0.5, 1.5)),
            top_p=chance.choice((1.0, 0.8)),
            top_k=chance.choice((0, 300)),
            frequency_penalty=chance.choice((0.0, 1.0)),
            logprobs=chance.choice((None, 2)),
            seed=n,
        )
        for n in range(count)
    ]


def answers(engine: Engine, *sequences: Sequence) -> dict[str, list[int]]:
    """What each is answered, all of them submitted at once."""
    for each in sequences:
        engine.submit(each)
    return finish(engine)


def finish(engine: Engine) -> dict[str, list[int]]:
    """Step until nothing is left to compute; what each request gained meanwhile."""
    gained: dict[str, list[int]] = {}
    while results := engine.step():
        for answer in results.answers:
            assert "Refused" not in type(answer).__name__, answer
        for step in results.steps:
            gained.setdefault(step.request_id, []).extend(step.ids)
    return gained


@torch.inference_mode()
def logits(model: Loaded, ids: Seq[int]) -> Tensor:
    """(T, V): of every position, as no request can ask for them."""
    runner = model.runner
    blocks = tuple(range(-(-len(ids) // model.layout.groups[0].block_tokens)))
    row = Row(slot=0, start=0, num_new=len(ids), ids=tuple(ids))
    runner._tables.clear(0)
    runner._tables.extend(0, [blocks] * len(model.layout.groups))
    batch = build([row], runner._tables, runner._shapes)
    return runner._model.logits(runner._model.forward(batch, runner._cache.layers))
