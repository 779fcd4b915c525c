"""From a folder to a runner: what is mapped, what is chosen, what is refused with which words."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infire.device import NoDevice, choose_device, choose_dtype
from infire.model.config import MissingFile
from infire.weight_files import DamagedWeights, MissingTensor, WrongShape
from infire.weights import WeightFiles
from tests.infire.driving import answers, engine, loaded, sequence
from tests.infire.small_models import VOCABULARY, make_folder

PROMPT = [5, 60, 100, 7, 200]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder("llama tied", tmp_path)


def said(folder: Path, **settings: Any) -> list[int]:
    return answers(engine(loaded(folder, **settings)), sequence("a", PROMPT, 9))["a"]


def test_what_is_said_of_a_loaded_model(folder: Path) -> None:
    model = loaded(folder, kv_tokens=1000, block_tokens=16)
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert (model.context_window, model.vocab_size) == (1024, VOCABULARY)
    assert model.num_blocks == (63,)
    assert model.load_s > 0
    (group,) = model.layout.groups
    assert (group.layers, group.num_heads, group.head_dim) == ((0, 1, 2), 2, 16)
    assert (group.kind, group.window, group.block_tokens) == ("full", None, 16)
    assert model.layout.dtype == "float32"


def test_layers_that_forget_alike_share_block_tables(tmp_path: Path) -> None:
    folder = make_folder("qwen2 windows", tmp_path)
    model = loaded(folder, kv_tokens=4096, max_step_tokens=7, max_running=2)
    full, sliding = model.layout.groups
    assert (full.kind, full.layers, full.window) == ("full", (0,), None)
    assert (sliding.kind, sliding.layers, sliding.window) == ("sliding", (1, 2), 21)
    # A window of 21 and a step of 7 span 27 tokens: 2 blocks and 2 more for the ends, a row.
    assert model.num_blocks == (256, 8)


def test_weights_in_several_files_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    sharded = make_folder("llama tied", tmp_path / "sharded", shard_bytes=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert said(sharded) == said(folder)


def test_bfloat16_weights_may_be_computed_in_float32(tmp_path: Path) -> None:
    folder = make_folder("llama tied", tmp_path, dtype=torch.bfloat16)
    for dtype in ("float32", "bfloat16"):
        assert loaded(folder, dtype=dtype).dtype == dtype
        assert len(said(folder, dtype=dtype)) == 9


# --- what is mapped -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_two_processes_share_the_pages_of_the_weight_file(tmp_path: Path) -> None:
    folder = make_folder("llama tied", tmp_path, dtype=torch.bfloat16)
    model = loaded(folder, dtype="bfloat16")
    answers(engine(model), sequence("a", PROMPT, 9))
    with another_process(folder):
        (kilobytes,) = mapped(folder / "model.safetensors")
    assert kilobytes["Rss"] > 0.9 * kilobytes["Size"]
    # Dirty as long as the kernel has not written the new file to the disk.
    assert kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"] == kilobytes["Rss"]
    assert kilobytes["Anonymous"] == 0


@contextmanager
def another_process(folder: Path) -> Iterator[None]:
    """One that has loaded the folder, until the block is left."""
    code = (
        "import sys; from pathlib import Path; from tests.infire.driving import loaded;"
        "model = loaded(Path(sys.argv[1]), dtype='bfloat16'); print('ready', flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield
        process.stdin.close()


def mapped(path: Path) -> list[dict[str, int]]:
    """In KiB, of each mapping of the file in this process; one for each time it was opened."""
    found: list[dict[str, int]] = []
    wanted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the head of a mapping: addresses, ..., path
            wanted = line.endswith(str(path))
            found += [{}] if wanted else []
        elif wanted and rest[-1] == "kB":
            found[-1][name.rstrip(":")] = int(rest[0])
    return found


# --- the digest ---------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    assert loaded(folder).model_digest == hashlib.sha256(content).hexdigest()


def test_the_digest_that_was_worked_out_when_pulling_is_taken(folder: Path) -> None:
    (folder / "edgefire.json").write_text(json.dumps({"source": "path:x", "model_digest": "abc"}))
    model = loaded(folder)
    assert model.model_digest == model.layout.model_digest == "abc"


# --- device and type ----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_auto_computes_on_the_cpu_and_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert loaded(folder, device="auto").device == "cpu"
    [record] = [it for it in caplog.records if "CPU" in it.message]  # it has no tokenizer either
    assert record.getMessage().startswith("computing on the CPU: ")
    with pytest.raises(NoDevice):
        loaded(folder, device="cuda")


@pytest.mark.gpu
def test_auto_takes_a_gpu_that_works() -> None:
    assert choose_device("auto") == (torch.device("cuda", 0), None)


def test_an_unknown_device_or_type_is_refused() -> None:
    with pytest.raises(NoDevice, match="'tpu' is not one of auto, cpu, cuda"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="'int8' is not one of auto, bfloat16, float32"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_dtype("auto", torch.device("cpu")) == expected


# --- folders that cannot be served --------------------------------------------------------------


def rewritten(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{n.replace("__", "."): t for n, t in changes.items()}}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return folder


def test_a_missing_weight_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"model\.safetensors is missing"):
        loaded(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, shard_bytes=100_000)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(MissingFile, match=r"model-00002-of-\d+\.safetensors is missing"):
        loaded(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewritten(folder, model__norm__weight=None)
    with pytest.raises(MissingTensor, match=r"the weights lack model\.norm\.weight"):
        loaded(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    rewritten(folder, model__norm__weight=torch.ones(71))
    with pytest.raises(WrongShape, match=r"norm\.weight is \(71,\).* says \(72,\)"):
        loaded(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_a_weight_file_that_was_cut_short(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedWeights, match=r"model\.safetensors is damaged or cut short"):
        loaded(folder)


def test_tensors_are_given_on_request_only(folder: Path) -> None:
    weights = WeightFiles(folder, device=torch.device("cpu"), dtype=torch.float32)
    assert weights.take("model.norm.weight", 72).shape == (72,)
