"""A model served from a bundle is the model that was packed, and is never in memory as BF16."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from infire.model.config import BadModel, read_config
from infire.model.families import model_config
from infire.native.resident import resident, write
from infire.native.tensors import TensorFiles
from infire.pull import PullError, pull
from infire.weight_files import DamagedWeights, MissingTensor, WrongShape, model_digest
from infire.weights import WeightFiles
from tests.infire.pulled import manifest
from tests.infire.small_models import make_folder
from unweight.reader import is_bundle
from unweight.writer import pack_folder

MATRIX = "model.layers.1.mlp.up_proj.weight"  # large enough to be compressed


def bundle_of(folder: Path, into: Path) -> Path:
    pack_folder(folder, into, threads=2)
    assert any(is_bundle(path) for path in into.glob("*.safetensors"))
    return into


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("llama biases", tmp_path_factory.mktemp("plain"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def bundle(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(plain, tmp_path_factory.mktemp("packed") / "bundle")


def damaged(bundle: Path, into: Path, part: str) -> Path:
    """A copy with one bit of a part of `MATRIX` flipped."""
    shutil.copytree(bundle, into)
    path = into / "model.safetensors"
    with safe_open(path, framework="np") as file:
        wanted = file.get_tensor(f"{MATRIX}.{part}").tobytes()
    content = bytearray(path.read_bytes())
    assert content.count(wanted) == 1
    content[content.index(wanted) + len(wanted) // 2] ^= 4
    path.write_bytes(content)
    return into


def resident_bytes(folder: Path, path: Path, *, form: str = "u12") -> bytes:
    write(path, folder, model_config(read_config(folder)), "digest", form=form, threads=2)
    return path.read_bytes()


@pytest.mark.parametrize("form", ["u12", "bf16"])
@pytest.mark.parametrize("kind", ["llama tied", "qwen3 tied biases", "llama biases"])
def test_the_resident_file_is_the_same(kind: str, form: str, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "plain", dtype=torch.bfloat16, shard_bytes=60_000)
    packed = bundle_of(folder, tmp_path / "bundle")
    one, other = (resident_bytes(f, tmp_path / f"{f.name}.x", form=form) for f in (folder, packed))
    assert one == other


def test_a_bundle_of_float32_is_rounded_as_its_source_is(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "plain", dtype=torch.float32)
    pack_folder(folder, tmp_path / "bundle", threads=1)
    one, other = (TensorFiles(f).take(MATRIX, 100, 72) for f in (folder, tmp_path / "bundle"))
    assert np.array_equal(one, other)


def test_the_digest_is_that_of_what_was_packed(plain: Path, bundle: Path) -> None:
    expected = hashlib.sha256((plain / "model.safetensors").read_bytes()).hexdigest()
    assert model_digest(plain) == model_digest(bundle) == expected


def test_shards_have_the_digest_of_their_sources(tmp_path: Path) -> None:
    folder = make_folder("llama tied", tmp_path / "plain", dtype=torch.bfloat16, shard_bytes=60_000)
    packed = bundle_of(folder, tmp_path / "bundle")
    assert len(list(packed.glob("*.safetensors"))) > 2
    assert model_digest(packed) == model_digest(folder)


def test_torch_gets_the_same_tensors(plain: Path, bundle: Path) -> None:
    cpu = torch.device("cpu")
    one, other = (WeightFiles(f, device=cpu, dtype=torch.bfloat16) for f in (plain, bundle))
    for name, shape in ((MATRIX, (100, 72)), ("model.norm.weight", (72,))):
        assert torch.equal(one.take(name, *shape), other.take(name, *shape))
    with pytest.raises(MissingTensor, match=r"up_proj\.weight\.sm"):
        one.take(f"{MATRIX}.sm", 100, 72)
    with pytest.raises(WrongShape, match="up_proj"):
        other.take(MATRIX, 72, 100)


def test_parts_are_no_tensors_of_the_model(bundle: Path) -> None:
    files = TensorFiles(bundle)
    with pytest.raises(MissingTensor, match=r"up_proj\.weight\.exp"):
        files.take(f"{MATRIX}.exp", 1)
    with pytest.raises(MissingTensor, match="nothing"):
        files.take("nothing", 1)
    with pytest.raises(WrongShape, match=r"up_proj.*\(72, 100\)"):
        files.take(MATRIX, 72, 100)


@pytest.mark.parametrize("part", ["sm", "exp", "xxh3"])
def test_a_damaged_chunk_makes_no_resident_file(bundle: Path, tmp_path: Path, part: str) -> None:
    broken = damaged(bundle, tmp_path / "broken", part)
    config = model_config(read_config(broken))
    with pytest.raises(DamagedWeights, match=MATRIX):
        resident(broken, config, "abc", form="u12", cache=tmp_path / "cache", threads=1)
    assert list((tmp_path / "cache" / "resident").glob("abc.u12")) == []
    with pytest.raises(DamagedWeights, match=MATRIX):
        WeightFiles(broken, device=torch.device("cpu"), dtype=torch.float32).take(MATRIX, 100, 72)


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
def test_a_bundle_cut_short_is_damaged(bundle: Path, tmp_path: Path, kept: int) -> None:
    content = (bundle / "model.safetensors").read_bytes()[:kept]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedWeights, match=r"model\.safetensors is damaged or cut short"):
        TensorFiles(tmp_path)
    with pytest.raises(BadModel):
        model_digest(tmp_path)


def test_a_bundle_is_never_in_memory_as_bf16(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=24,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.bfloat16().save_pretrained(tmp_path / "plain")
    packed = bundle_of(tmp_path / "plain", tmp_path / "bundle")
    config = model_config(read_config(packed))
    num_bytes = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert num_bytes > 30_000_000
    tracemalloc.start()
    try:
        write(tmp_path / "resident", packed, config, "digest", form="u12", threads=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_bytes / 4, f"{peak} bytes for a model of {num_bytes}"


def test_tied_embeddings_are_kept_once(tmp_path: Path) -> None:
    sizes = {}
    for kind in ("llama", "llama tied"):
        folder = make_folder(kind, tmp_path / f"{kind} plain", dtype=torch.bfloat16)
        packed = bundle_of(folder, tmp_path / kind)
        config = model_config(read_config(packed))
        found = resident(packed, config, kind, form="u12", cache=tmp_path / "cache", threads=1)
        sizes[kind] = found.num_bytes
    assert 211 * 72 * 1.5 < sizes["llama"] - sizes["llama tied"] < 224 * 72 * 1.6


class TestPull:
    @pytest.fixture
    def source(self, bundle: Path, tmp_path: Path) -> Path:
        shutil.copytree(bundle, tmp_path / "source")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "source" / name).write_text("{}")
        return tmp_path / "source"

    def test_a_bundle_is_the_model_it_was_packed_from(
        self, plain: Path, source: Path, tmp_path: Path
    ) -> None:
        expected = model_digest(plain)
        pull(f"path:{source}", tmp_path / "into", model_digest=expected)
        assert manifest(tmp_path / "into").model_digest == expected
        assert model_digest(tmp_path / "into") == expected

    def test_what_it_says_of_its_source_is_not_believed(self, source: Path, tmp_path: Path) -> None:
        path = source / "model.safetensors"
        content = path.read_bytes()
        digest = model_digest(source)
        path.write_bytes(content.replace(digest.encode(), b"0" * 64))
        with pytest.raises(PullError, match="weights"):
            pull(f"path:{source}", tmp_path / "into", model_digest="0" * 64)
        assert not (tmp_path / "into").exists()

    def test_a_damaged_bundle_is_refused(self, source: Path, tmp_path: Path) -> None:
        broken = damaged(source, tmp_path / "broken", "exp")
        with pytest.raises(PullError, match=MATRIX):
            pull(f"path:{broken}", tmp_path / "into")
        assert not (tmp_path / "into").exists()
