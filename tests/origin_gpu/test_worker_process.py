"""Worker processes as they are started for real: how they live, die, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import psutil
import pytest

from origin_gpu.handover import (
    Collected,
    Computing,
    Peer,
    Prefill,
    Prefilled,
    Resume,
    Watch,
    Watched,
)
from origin_gpu.kv_files import roots
from routing import wire
from routing.errors import Code
from tests.fakes.model_folder import make_counting_folder
from tests.system.procs import engines, linked, wait_ready, worker_processes
from tests.system.world import MODEL, ROOT, Shape, World, start, worker_words

pytestmark = pytest.mark.system
PATIENCE_S = 60.0


async def request(made: World, name: str, *, num_prompt: int, max_tokens: int) -> wire.Generate:
    """A prompt of 65s, which goes on 66, 67 ..."""
    return wire.Generate(
        request_id="r1",
        tenant_salt=b"",
        model=MODEL,
        tokenizer_digest=(await made.worker(name)).models[0].tokenizer_digest,
        token_ids=(65,) * num_prompt,
        sampling=wire.Sampling(max_tokens=max_tokens, seed=1),
        budget_s=PATIENCE_S,
    )


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def wait_gone(process: psutil.Process, within_s: float = PATIENCE_S) -> None:
    with anyio.fail_after(within_s):
        while not gone(process):
            await anyio.sleep(0.01)


async def test_two_processes_hand_over(tmp_path: Path) -> None:
    async with (
        worker_processes(tmp_path) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
    ):
        asked = await request(made, "weur-prefill", num_prompt=2000, max_tokens=8)
        async with prefill.open(Watch(())) as events, prefill.open(Prefill(asked)) as held:
            watched = await anext(aiter(events))
            assert isinstance(watched, Watched)
            answer = aiter(held)
            assert isinstance(await anext(answer), Computing)  # 512 tokens, of 2,000
            prefilled = await anext(answer)
            assert isinstance(prefilled, Prefilled)
            assert prefilled.piece_ends == (512, 1024, 1536, 2000)
            url = made.processes["weur-prefill"].url
            giver = Peer(
                name="weur-prefill", role="prefill", url=url, kv_address=watched.kv_address
            )
            got = list(prefilled.first.ids)
            async with decode.open(Watch((giver,))), decode.open(Resume(asked, prefilled)) as rest:
                async for event in rest:
                    if isinstance(event, wire.Tokens):
                        got += event.ids
            assert await anext(answer) == Collected()
        assert got == [66, 67, 68, 69, 70, 71, 72, 73]
        assert isinstance(event, wire.Finish)
        await made.settled("weur-prefill", "weur-decode")
        computed = [(await made.worker(name)).prompt_tokens_computed for name in made.processes]
        assert computed == [2000, 0]


async def test_a_killed_worker_leaves_no_engine_and_its_files_go_with_the_next(
    tmp_path: Path,
) -> None:
    shape = Shape(roles=("prefill",))
    async with worker_processes(tmp_path, shape) as made, linked(made, "weur-prefill") as link:
        asked = await request(made, "weur-prefill", num_prompt=100, max_tokens=8)
        process = made.processes["weur-prefill"]
        (engine,) = engines(process)
        ended = anyio.Event()
        link.open_nowait(Prefill(asked), lambda event: ended.set() if event is None else None)
        with anyio.fail_after(PATIENCE_S):
            while not (found := kv_folders(process.popen.pid)) or not any(found[0].iterdir()):
                await anyio.sleep(0.01)
        process.kill()
        await wait_gone(engine)
        with anyio.fail_after(PATIENCE_S):
            await ended.wait()
        words = worker_words(made, shape, "weur", "prefill", tmp_path / "model")
        await wait_ready(made, start(made, "weur-prefill", words))
        assert not any(folder.exists() for folder in found)


async def test_a_killed_engine_is_replaced(tmp_path: Path) -> None:
    shape = Shape(roles=("both",), step_s=0.02)
    async with worker_processes(tmp_path, shape) as made, linked(made, "weur-both") as link:
        asked = await request(made, "weur-both", num_prompt=2, max_tokens=5000)
        before = await made.worker("weur-both")
        (engine,) = engines(made.processes["weur-both"])
        with anyio.fail_after(PATIENCE_S):
            async with link.open(asked) as events:
                answer = aiter(events)
                assert await anext(answer) == wire.Started(0)
                engine.kill()
                rest = [event async for event in answer]
        assert isinstance(rest[-1], wire.Fault)
        assert rest[-1].code is Code.LOST
        await wait_ready(made, made.processes["weur-both"])
        assert (await made.worker("weur-both")).epoch != before.epoch
        (another,) = engines(made.processes["weur-both"])
        assert another.pid != engine.pid


async def test_a_cut_does_not_wait_for_a_long_step(tmp_path: Path) -> None:
    shape = Shape(roles=("both",), step_s=600.0)
    async with worker_processes(tmp_path, shape) as made, linked(made, "weur-both") as link:
        asked = await request(made, "weur-both", num_prompt=2, max_tokens=8)
        process = made.processes["weur-both"]
        (engine,) = engines(process)
        link.open_nowait(asked, lambda event: None)
        with anyio.fail_after(PATIENCE_S):
            while not (await made.worker("weur-both")).in_flight:
                await anyio.sleep(0.01)
        process.popen.terminate()
        with anyio.fail_after(PATIENCE_S):
            while (await made.worker("weur-both")).ready:
                await anyio.sleep(0.01)
        process.popen.terminate()
        assert await anyio.to_thread.run_sync(process.popen.wait, 30) == 0
        assert gone(engine)


@pytest.mark.parametrize(
    ("missing", "engine", "said"),
    [
        ("tokenizer.json", "true", "tokenizer.json cannot be read: No such file"),
        (None, "false", "exit code 1"),
        (None, "/no/such/engine", "/no/such/engine cannot be started"),
    ],
)
def test_a_worker_that_cannot_work_says_why(
    tmp_path: Path, missing: str | None, engine: str, said: str
) -> None:
    folder = make_counting_folder(tmp_path / "model")
    if missing:
        (folder / missing).unlink()
    (tmp_path / "secret").write_text("s")
    words = ["--name", "w", "--region", "r", "--role", "both", "--model", MODEL]
    words += ["--model-dir", str(folder), "--secret-file", str(tmp_path / "secret")]
    done = subprocess.run(
        [sys.executable, "-m", "origin_gpu", "worker", *words, "--engine-command", engine],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_imports_no_torch() -> None:
    """It computes nothing: torch would cost it seconds to start, and half a gigabyte."""
    code = "import sys, origin_gpu.__main__, origin_gpu.worker_app; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def kv_folders(pid: int) -> list[Path]:
    """The private folders of a process that have something in them first."""
    found = [folder for root in roots() for folder in root.glob(f"edgefire-kv-{pid}-*")]
    return sorted(found, key=lambda folder: not any(folder.iterdir()))
