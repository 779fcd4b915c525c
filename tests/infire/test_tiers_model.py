"""With the real small model: what comes back from behind the device is bit for bit what went."""

from __future__ import annotations

from pathlib import Path

import pytest

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.loaded import Loaded
from infire.scheduler import Scheduler
from infire.tier_files import make_tiers
from tests.infire.driving import answers, loaded_native, sequence


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> Loaded:
    return loaded_native(smollm2_folder, kv_tokens=1024)


def engine(model: Loaded, *, host_bytes: int = 0, folder: Path | None = None) -> Engine:
    limits = Limits(
        max_step_tokens=256, max_running=4, context_window=model.context_window,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    tiers = make_tiers(model.layout, host_bytes=host_bytes, folder=folder, disk_bytes=1 << 30)
    pools = [BlockPool(count) for count in model.num_blocks]
    model.runner.tags.reset()
    scheduler = Scheduler(
        pools, model.layout.groups, limits, model_digest=model.layout.model_digest, tier=tiers
    )
    return Engine(scheduler, model.runner, tiers=tiers)


def prompts() -> list[list[int]]:
    """Of some 500 tokens each: of three, two fit in the pool."""
    return [
        [(7 * n * n + 31 * n + 1000 * turn) % 40000 + 100 for n in range(500)] for turn in (1, 2, 3)
    ]


def asked(it: Engine, name: str, prompt: list[int]) -> list[int]:
    return answers(it, sequence(name, prompt, 12, temperature=0.8))[name]


def test_the_ids_are_those_of_a_prompt_that_was_computed(model: Loaded, tmp_path: Path) -> None:
    plain = engine(model)
    alone = [asked(plain, f"p{n}", prompt) for n, prompt in enumerate(prompts())]
    tiers = engine(model, host_bytes=1 << 28, folder=tmp_path)
    for turn in range(2):
        for n, prompt in enumerate(prompts()):
            assert asked(tiers, f"{turn} {n}", prompt) == alone[n]
    assert tiers.gauges().host_blocks_found > 31
    assert tiers.gauges().prompt_tokens_computed < 3 * 500 + 3 * 100
    while tiers.rest():
        tiers._tiers._files.wait_written()  # type: ignore[union-attr]
    again = engine(model, folder=tmp_path)
    for n, prompt in enumerate(prompts()):
        assert asked(again, f"again {n}", prompt) == alone[n]
    gauges = again.gauges()
    assert gauges.disk_blocks_found == 3 * 31
    assert gauges.prompt_tokens_computed == 3 * (500 - 31 * 16)
