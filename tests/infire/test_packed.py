"""A decoder whose matrices are in 12-bit tiles computes what it does in BF16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this platform")

import infire.packed
from infire.kv_cache import KVCache
from infire.kv_layout import KVLayout
from infire.kv_pools import kv_groups
from infire.model.config import ModelConfig, read_config
from infire.model.families import model_config
from infire.model.transformer import Transformer, transformer
from infire.packed import PackedWeights
from infire.plan import Row, SlotOpen, StepPlan
from infire.request import SamplingParams
from infire.runner import ModelRunner
from infire.weights import WeightFiles
from tests.infire.small_models import make_folder
from tests.unweight.gpu.matrices import DEVICE, bits
from unweight.gpu.linear import Linear as Tiled
from unweight.gpu.plans import Plans
from unweight.gpu.weight import to_device
from unweight.tiles import pack_tiles
from unweight.writer import pack_folder

# As narrow as the other small models are, no matrix pays: tiles have 128 inputs.
WIDE = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1,
    "num_attention_heads": 8, "head_dim": 32, "vocab_size": 256,
}  # fmt: skip
RULES_OF_THUMB = Plans(gpu="none", measured="never", shapes={})


@pytest.fixture(autouse=True)
def packed_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tiles in a hundredth of the time that the interpreter takes."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(
            infire.packed,
            "pack_on_device",
            lambda dense: to_device(pack_tiles(bits(dense)), DEVICE),
        )


def both(kind: str, path: Path, *, bundle: bool) -> tuple[ModelConfig, Transformer, Transformer]:
    """The model in BF16, and in tiles."""
    folder = make_folder(kind, path / "plain", dtype=torch.bfloat16, **WIDE)
    config = model_config(read_config(folder))
    plain = WeightFiles(folder, device=DEVICE, dtype=torch.bfloat16)
    if bundle:
        pack_folder(folder, path / "bundle", threads=1)
    source = WeightFiles(
        path / "bundle" if bundle else folder, device=DEVICE, dtype=torch.bfloat16, threads=2
    )
    packed = PackedWeights(source, DEVICE, RULES_OF_THUMB)
    return (
        config,
        transformer(config, plain, max_tokens=64),
        transformer(config, packed, max_tokens=64),
    )


def near(one: Tensor, other: Tensor) -> bool:
    """To a few roundings of BF16, of which the interpreter's are the coarser."""
    return bool((one.double() - other.double()).norm() < 0.02 * one.double().norm())


@pytest.mark.parametrize(("kind", "bundle"), [("llama biases", False), ("qwen3 tied biases", True)])
def test_every_part_of_a_layer(kind: str, bundle: bool, tmp_path: Path) -> None:
    config, plain, packed = both(kind, tmp_path, bundle=bundle)
    x = torch.randn(5, config.hidden_size).bfloat16().to(DEVICE)
    one, other = plain.layers[0], packed.layers[0]
    (qkv,) = other.attention.qkv.linears  # one product for three
    for linear in (qkv, other.attention.out, other.mlp.down, packed.head):
        assert isinstance(linear.weight, Tiled)
    for a, b in zip(one.attention.qkv(x), other.attention.qkv(x), strict=True):
        assert a.shape == b.shape
        assert near(a, b)
    assert near(one.mlp(x), other.mlp(x))
    assert near(plain.logits(x), packed.logits(x))
    ids = torch.tensor([0, 255, 7, 7], device=DEVICE)
    assert torch.equal(plain.embeddings(ids), packed.embeddings(ids))
    if config.tied_embeddings:
        assert packed.embeddings.weight is packed.head.weight  # one copy


def test_a_prompt_decoded_first_is_near_too(tmp_path: Path) -> None:
    config, plain, packed = both("llama", tmp_path, bundle=False)
    x = torch.randn(130, config.hidden_size).bfloat16().to(DEVICE)  # past the fused kernel's rows
    assert near(plain.layers[0].mlp(x), packed.layers[0].mlp(x))


def test_what_does_not_pay_stays_in_bf16(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, dtype=torch.bfloat16, **WIDE)

    class Noise(WeightFiles):
        """Every exponent equally often."""

        def take(self, name: str, *shape: int) -> Tensor:
            bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)
            return bits.view(torch.bfloat16).to(DEVICE)

    noise = Noise(folder, device=DEVICE, dtype=torch.bfloat16)
    found = PackedWeights(noise, DEVICE, RULES_OF_THUMB).matrices((("a", 70), ("b", 10)), 256)
    assert [type(matrix) for matrix in found] == [Tensor]
    assert found[0].shape == (80, 256)
    some = PackedWeights(
        WeightFiles(folder, device=DEVICE, dtype=torch.bfloat16), DEVICE, RULES_OF_THUMB
    )
    (matrix,) = some.matrices((("model.layers.0.mlp.up_proj.weight", 384),), 256)
    assert isinstance(matrix, Tiled)


def test_a_step_runs(tmp_path: Path) -> None:
    config, *models = both("llama biases", tmp_path, bundle=False)
    layout = KVLayout(groups=kv_groups(config, 16), dtype="bfloat16", model_digest="x")
    exported = []
    for n, model in enumerate(models):
        runner = ModelRunner(model, KVCache(layout, (4,), DEVICE), num_slots=1, max_tokens=64)
        ids = (5, 60, 100, 7, 200)
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        opened = SlotOpen(slot=0, token_ids=ids, num_prompt=5, sampling=sampling)
        row = Row(slot=0, start=0, num_new=5, ids=ids, new_blocks=((0,),))
        (result,) = runner.run(StepPlan(step=0, opens=(opened,), rows=(row,)))
        assert len(result.ids) == 1
        path = tmp_path / f"kv{n}"
        size = runner.export(((0,),), 5, str(path))
        exported.append(torch.from_file(str(path), size=size // 2, dtype=torch.bfloat16))
    assert near(*exported)
