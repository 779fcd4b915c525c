"""Case 23: weights that are not what they should be. Real workers with the real engine refuse them
by name, and the fleet that they are of goes on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from safetensors import safe_open

from infire.pull import pull
from routing.paths import paths
from tests.fakes.small_gguf import small_llama, small_tokenizer, write_gguf
from tests.system.faults import PATIENCE_S, restart
from tests.system.world import MODEL, Process, Shape, World, counted, world
from unweight.writer import pack_folder

pytestmark = pytest.mark.system
WEIGHTS = "model.safetensors"
PART = "model.layers.1.mlp.up_proj.weight.sm"
SHAPE = Shape(roles=("prefill", "decode", "prefill-2"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as pulled, its weights packed; not to be changed."""
    home, tokenizer = tmp_path_factory.mktemp("bundle"), small_tokenizer()
    file = write_gguf(home / "Tiny.gguf", small_llama(tokenizer), tokenizer)
    pull(f"path:{file}", home / "plain")
    pack_folder(home / "plain", home / "packed", threads=1)
    return home / "packed"


def flip_a_bit(file: Path) -> None:
    """In the middle of what one matrix was compressed to."""
    with safe_open(file, framework="np") as tensors:
        part = tensors.get_tensor(PART).tobytes()
    content = bytearray(file.read_bytes())
    assert content.count(part) == 1
    content[content.index(part) + len(part) // 2] ^= 4
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def remove(file: Path) -> None:
    file.unlink()


async def start_with(w: World, name: str, folder: Path) -> Process:
    """The worker `name` anew, with the real engine and the model in `folder`."""
    words = ["origin_gpu", "worker", "--region", "weur", "--role", "prefill", "--model", MODEL]
    words += ["--model-dir", str(folder), "--secret-file", str(w.home / "secret")]
    # Kernels are where they are for all: to compile them anew takes longer than to look at weights.
    engine = f"{sys.executable} -m infire serve --cache-dir {paths(os.environ).cache}"
    return await restart(w, name, [*words, "--engine-command", engine, "--device", "cpu"])


async def ended(process: Process) -> int:
    with anyio.fail_after(PATIENCE_S):
        while (code := process.popen.poll()) is None:
            await anyio.sleep(0.05)
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(flip_a_bit, PART.removesuffix(".sm")), (cut_short, WEIGHTS), (remove, WEIGHTS)],
)
async def test_a_worker_refuses_damaged_weights_and_others_go_on(
    spoil: Callable[[Path], None], said: str, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(bundle, folder)
    spoil(folder / WEIGHTS)
    home = tmp_path / "world"
    home.mkdir()
    async with world(home, SHAPE) as w:
        process = await start_with(w, "weur-prefill-2", folder)
        codes: list[int] = []
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                codes.append(await ended(process))

            tasks.start_soon(wait)
            while not codes:
                answer = await w.raw("A", 5)
                assert answer.status_code == 200
                assert answer.json()["result"]["response"] == counted("A", 5)
        del w.processes[process.name]  # it has ended, and not with 0 as those have that are stopped
        log = process.log.read_text()
        assert codes == [1]
        assert said in log
        assert "Traceback" not in log
