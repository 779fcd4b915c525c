"""The compiled kernels as a whole model, a family each: log probabilities against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from infire.kv_layout import WeightCodec
from infire.loaded import Loaded
from infire.plan import Row, SlotOpen, StepPlan
from infire.request import SamplingParams
from tests.infire.cpu.kernels import MARCHES
from tests.infire.driving import answers, engine, loaded, loaded_native, sequence
from tests.infire.prompts import prompts
from tests.infire.small_models import KINDS, VOCABULARY, greedy, make_folder, reference

PROMPTS = [[random.Random(n).randrange(VOCABULARY) for _ in range(n)] for n in (1, 7, 33, 150)]

NEAR_TIE = 0.5  # of logits around 20, which bfloat16 tells apart by 0.125


def logprobs(model: Loaded, prompt: list[int]) -> torch.Tensor:
    """(V,) of what follows."""
    ids = tuple(prompt)
    size = model.vocab_size
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=size)
    opened = SlotOpen(slot=1, token_ids=ids, num_prompt=len(ids), sampling=sampling)
    blocks = (tuple(range(-(-len(ids) // 16))),) * len(model.layout.groups)
    row = Row(slot=1, start=0, num_new=len(ids), ids=ids, new_blocks=blocks)
    (result,) = model.runner.run(StepPlan(step=1, opens=(opened,), rows=(row,)))
    found = torch.empty(size)
    for token_id, value in result.logprobs[0].top:
        found[token_id] = value
    return found


def errors(folder: Path, ours: Loaded, prompts: list[list[int]]) -> tuple[float, float]:
    """Of ours, and of transformers in bfloat16, from transformers in float32: root mean squares."""
    exact, rounded = reference(folder), reference(folder, torch.bfloat16)
    mine, theirs = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = exact(ids).logits[0, -1].log_softmax(-1)
            theirs.append(rounded(ids).logits[0, -1].float().log_softmax(-1) - expected)
        mine.append(logprobs(ours, prompt) - expected)
    return rms(mine), rms(theirs)


def rms(of: list[torch.Tensor]) -> float:
    return torch.cat(of).square().mean().sqrt().item()


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_float32_than_transformers_in_bfloat16(
    kind: str, march: str, tmp_path: Path
) -> None:
    folder = make_folder(kind, tmp_path, dtype=torch.bfloat16)
    mine, theirs = errors(folder, loaded_native(folder, march=march), PROMPTS)
    assert mine <= 1.25 * theirs


def test_nor_is_the_default_model(smollm2_folder: Path) -> None:
    asked = prompts(smollm2_folder)
    some = [asked[name] for name in ("short 6", "code 4", "unicode 4", "300 tokens of prose")]
    mine, theirs = errors(smollm2_folder, loaded_native(smollm2_folder), some)
    assert mine <= 1.25 * theirs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_greedy_ids_are_those_of_transformers_but_for_near_ties(smollm2_folder: Path) -> None:
    """Of transformers in float32; at the first that differs its two likeliest are close."""
    model, exact = loaded_native(smollm2_folder), reference(smollm2_folder)
    asked = prompts(smollm2_folder)
    found = answers(engine(model), *(sequence(name, ids, 64) for name, ids in asked.items()))
    whole = 0
    for name, ids in asked.items():
        expected = greedy(exact, ids, 64)
        common = next((n for n in range(64) if found[name][n] != expected[n]), 64)
        whole += common == 64
        if common == 64:
            continue
        with torch.inference_mode():
            logits = exact(torch.tensor([ids + expected[:common]])).logits[0, -1]
        assert logits.max() - logits[found[name][common]] < NEAR_TIE, name
    assert whole >= len(asked) // 3


def test_12_bits_say_what_16_say(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, dtype=torch.bfloat16)
    packed, plain = loaded_native(folder), loaded_native(folder, weights="bf16")
    assert packed.layout.codec == WeightCodec("u12")  # which is exact, so that the KV is the same:
    assert packed.layout != plain.layout
    assert packed.layout.digest == plain.layout.digest
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
