"""The default model against `transformers` on the same folder: ids in FP32, logits in BF16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infire.loaded import Loaded
from tests.infire.driving import answers, engine, loaded, logits, sequence
from tests.infire.prompts import prompts
from tests.infire.small_models import greedy, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def theirs(smollm2_folder: Path, device: str) -> PreTrainedModel:
    return reference(smollm2_folder).to(device)


@pytest.fixture(scope="module")
def ours(smollm2_folder: Path, device: str) -> Loaded:
    return loaded(smollm2_folder, device=device, kv_tokens=8192)


@pytest.mark.parametrize("name", ["short 6", "code 0", "unicode 4"])
def test_greedy_ids_are_those_of_transformers(
    name: str, smollm2_folder: Path, ours: Loaded, theirs: PreTrainedModel
) -> None:
    ids = prompts(smollm2_folder)[name]
    assert answers(engine(ours), sequence(name, ids, 32))[name] == greedy(theirs, ids, 32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_ids_are_those_of_transformers_over_128_tokens(
    smollm2_folder: Path, ours: Loaded, theirs: PreTrainedModel
) -> None:
    asked = prompts(smollm2_folder)
    assert len(asked) >= 20
    found = answers(engine(ours), *(sequence(name, ids, 128) for name, ids in asked.items()))
    for name, ids in asked.items():
        assert found[name] == greedy(theirs, ids, 128), name


def test_logits_in_bfloat16_are_as_near_to_float32_as_those_of_transformers(
    smollm2_folder: Path, theirs: PreTrainedModel, device: str
) -> None:
    half = loaded(smollm2_folder, device=device, dtype="bfloat16")
    their_half = reference(smollm2_folder, torch.bfloat16).to(device)
    asked = prompts(smollm2_folder)
    texts = [asked[name] for name in ("short 6", "code 4", "unicode 4", "300 tokens of prose")]
    exact = [full_logits(theirs, ids) for ids in texts]
    our_error = error([logits(half, ids) for ids in texts], exact)
    their_error = error([full_logits(their_half, ids) for ids in texts], exact)
    assert our_error <= 1.25 * their_error


def test_logits_in_float32_are_those_of_transformers(
    smollm2_folder: Path, ours: Loaded, theirs: PreTrainedModel
) -> None:
    ids = prompts(smollm2_folder)["300 tokens of prose"]
    assert error([logits(ours, ids)], [full_logits(theirs, ids)]) < 1e-4


@torch.inference_mode()
def full_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids], device=model.device)).logits[0].float()


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Root mean square, over all logits of all positions."""
    return (torch.cat(found).float() - torch.cat(exact)).square().mean().sqrt().item()
