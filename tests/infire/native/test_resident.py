"""Weights packed once and mapped; files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infire.model.config import ModelConfig, read_config
from infire.model.families import model_config
from infire.native.resident import BadResident, read, resident, write
from infire.native.tensors import TensorFiles
from infire.weight_files import DamagedWeights, MissingTensor, WrongShape
from tests.infire.small_models import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("llama biases", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return model_config(read_config(folder))


@pytest.fixture
def packed(folder: Path, config: ModelConfig, tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    write(path, folder, config, "digest", form="u12", threads=1)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_rounded_as_torch_rounds(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    odd = torch.tensor([0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan"), 3.4e38])
    given = torch.cat((torch.randn(500), odd.to(dtype).float())).to(dtype)
    save_file({"t": given}, tmp_path / "model.safetensors")
    found = TensorFiles(tmp_path).take("t", 507)
    ours = torch.from_numpy(found.view(np.int16).copy()).view(torch.bfloat16)
    expected = given.bfloat16()
    assert torch.equal(ours.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(ours[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_a_wrong_name_or_shape_is_told(folder: Path) -> None:
    tensors = TensorFiles(folder)
    with pytest.raises(MissingTensor, match="nothing"):
        tensors.take("nothing", 1)
    with pytest.raises(WrongShape, match="norm"):
        tensors.take("model.norm.weight", 71)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000])
def test_a_file_cut_short_is_damaged(folder: Path, tmp_path: Path, length: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    with pytest.raises(DamagedWeights):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 10**9], [-4, 4], [4, 0], [0, 3]])
def test_tensors_outside_their_file_are_damage(tmp_path: Path, offsets: list[int]) -> None:
    header = json.dumps({"t": {"dtype": "BF16", "shape": [2], "data_offsets": offsets}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedWeights, match=r": t[ ,]"):
        TensorFiles(tmp_path)


def test_matrices_of_one_input_are_fused(folder: Path, config: ModelConfig, packed: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    found = read(packed, config, "digest")
    names = [f"model.layers.1.self_attn.{which}_proj.bias" for which in "qkv"]
    bias = torch.cat([weights[name] for name in names]).view(torch.int16).numpy()
    ours = found.vector("1.qkv_bias")
    assert ours is not None
    assert np.array_equal(ours[: len(bias)].view(np.int16), bias)
    assert not ours[len(bias) :].any()
    assert found.vector("1.q_norm") is None
    assert found.matrix("1.gate_up").num_strips == -(-2 * config.intermediate_size // 16)


def test_a_resident_file_that_is_not_whole_is_refused(config: ModelConfig, packed: Path) -> None:
    whole = packed.read_bytes()
    for broken in (b"", whole[:10_000], b"x" + whole[1:], whole + b" "):
        packed.write_bytes(broken)
        with pytest.raises(BadResident):
            read(packed, config, "digest")


def test_another_models_file_is_refused(config: ModelConfig, packed: Path) -> None:
    with pytest.raises(BadResident, match="other"):
        read(packed, config, "other")


def test_contents_that_lie_are_refused(config: ModelConfig, packed: Path) -> None:
    whole = packed.read_bytes()
    begin = int.from_bytes(whole[8:16], "little")
    for name, change in (
        ("0.qkv.data", {"offset": begin}),
        ("0.qkv.data", {"offset": 65}),
        ("0.qkv.data", {"num_bytes": 192}),
        ("0.qkv.ptr", {"offset": 64}),
        ("norm", {"num_bytes": 64}),
        ("0.down.exceptions", None),
    ):
        contents = json.loads(whole[begin:])
        if change is None:
            del contents["arrays"][name]
        else:
            contents["arrays"][name] |= change
        table = json.dumps(contents).encode()
        packed.write_bytes(whole[:16] + len(table).to_bytes(8, "little") + whole[24:begin] + table)
        with pytest.raises(BadResident):
            read(packed, config, "digest")


def test_a_damaged_file_in_the_cache_is_made_anew(
    folder: Path, config: ModelConfig, tmp_path: Path
) -> None:
    def get() -> int:
        return resident(folder, config, "abc", form="u12", cache=tmp_path, threads=1).num_bytes

    expected = get()
    (path,) = (tmp_path / "resident").glob("abc.u12")
    for damaged in (b"nonsense", b""):  # empty: as a machine that lost its power may leave it
        path.write_bytes(damaged)
        assert get() == expected
