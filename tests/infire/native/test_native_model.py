"""The compiled kernels as a whole model, a family each: log probabilities against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from infire.loaded import Loaded
from infire.plan import Row, SlotOpen, StepPlan
from infire.request import SamplingParams
from tests.infire.cpu.kernels import MARCHES
from tests.infire.driving import loaded, loaded_native
from tests.infire.small_models import KINDS, VOCABULARY, make_folder, reference

PROMPTS = [[random.Random(n).randrange(VOCABULARY) for _ in range(n)] for n in (1, 7, 33, 150)]


def logprobs(model: Loaded, prompt: list[int]) -> torch.Tensor:
    """(V,) of what follows."""
    ids = tuple(prompt)
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=VOCABULARY)
    opened = SlotOpen(slot=1, token_ids=ids, num_prompt=len(ids), sampling=sampling)
    blocks = (tuple(range(-(-len(ids) // 16))),) * len(model.layout.groups)
    row = Row(slot=1, start=0, num_new=len(ids), ids=ids, new_blocks=blocks)
    (result,) = model.runner.run(StepPlan(step=1, opens=(opened,), rows=(row,)))
    found = torch.empty(VOCABULARY)
    for token_id, value in result.logprobs[0].top:
        found[token_id] = value
    return found


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_float32_than_transformers_in_bfloat16(
    kind: str, march: str, tmp_path: Path
) -> None:
    folder = make_folder(kind, tmp_path, dtype=torch.bfloat16)
    ours = loaded_native(folder, march=march)
    exact, rounded = reference(folder), reference(folder, torch.bfloat16)
    errors = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = exact(ids).logits[0, -1].log_softmax(-1)
            theirs = rounded(ids).logits[0, -1].float().log_softmax(-1)
        mine = logprobs(ours, prompt)
        errors.append(
            ((mine - expected).square().mean().sqrt(), (theirs - expected).square().mean().sqrt())
        )
    mine, theirs = torch.tensor(errors).mean(0)
    assert mine <= 1.25 * theirs


def test_12_bits_say_what_16_say(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, dtype=torch.bfloat16)
    packed, plain = loaded_native(folder), loaded_native(folder, weights="bf16")
    for prompt in PROMPTS:
        assert torch.equal(logprobs(packed, prompt), logprobs(plain, prompt))


def test_kv_goes_between_kernels_and_torch(tmp_path: Path) -> None:
    """A prefill worker of one kind, a decode worker of the other."""
    folder = make_folder("qwen2 windows", tmp_path, dtype=torch.bfloat16)
    native, torched = loaded_native(folder), loaded(folder, dtype="bfloat16")
    assert native.layout.digest == torched.layout.digest
    blocks = [tuple(range(10))] * len(native.layout.groups)
    logprobs(native, PROMPTS[3])
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    size = native.runner.export(blocks, 150, first)
    torched.runner.adopt(blocks, 150, first)
    assert torched.runner.export(blocks, 150, second) == size
    assert Path(first).read_bytes() == Path(second).read_bytes()
