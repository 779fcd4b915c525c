"""Bundles that real processes make: killed, two at once, on a full disk."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.unweight.bundles import bundle, files
from unweight.writer import check_folder, pack_folder, unpack_folder

CALLED = (
    "import sys; from pathlib import Path; from unweight import coder, source, writer;"
    "source, target = map(Path, sys.argv[1:]);"
)
PACK = f"{CALLED} print(writer.pack_folder(source, target, threads=1))"
UNPACK = f"{CALLED} print(writer.unpack_folder(source, target, threads=1))"
SLOW = """
import time
from unweight import coder, reader
calls, stuck_at = iter(range(10**9)), {stuck_at}
def slowly(work):
    return lambda *a: (time.sleep(0.02 if next(calls) < stuck_at else 60), work(*a))[1]
coder.encode, reader.decode = slowly(coder.encode), slowly(reader.decode)
"""


def running(code: str, source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def killed(process: subprocess.Popen[str], making: Path) -> None:
    """SIGKILL, once there is something in the file that it makes."""
    with process:
        deadline = time.monotonic() + 60
        while not (making.exists() and making.stat().st_size > 0):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_one_that_was_killed_is_taken_up_again(model: Path, tmp_path: Path) -> None:
    """Stuck at the second chunk of the second file; packing codes two samples of each as well."""
    for code, stuck_at, convert, given, target in (
        (PACK, 6 + 2 + 1, pack_folder, model, tmp_path / "bundle"),
        (UNPACK, 4 + 1, unpack_folder, tmp_path / "bundle", tmp_path / "again"),
    ):
        slow = SLOW.format(stuck_at=stuck_at)
        killed(running(slow + code, given, target), target / ".model-1.safetensors.making")
        there = {"config.json", "model-0.safetensors", ".model-1.safetensors.making"}
        assert set(files(target)) == there
        stamp = (target / "model-0.safetensors").stat().st_mtime_ns
        made = convert(given, target, threads=2)
        assert made == ["model-1.safetensors", "model-2.safetensors"]
        assert (target / "model-0.safetensors").stat().st_mtime_ns == stamp
        assert set(files(target)) == set(files(model))
    assert files(tmp_path / "again") == files(model)


def test_two_at_once_make_one_bundle(model: Path, tmp_path: Path) -> None:
    """Slowly, so that they meet, and as fast as they can."""

    def run(code: str, target: Path) -> tuple[int, str]:
        with running(code, model, target) as process:
            _, errors = process.communicate(timeout=120)
            return process.returncode, errors

    slow = SLOW.format(stuck_at=1000)
    for code, target in ((slow + PACK, tmp_path / "slow"), (PACK, tmp_path / "bundle")):
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(run, code, target) for _ in range(2)]
            ends = [future.result() for future in both]
        assert 0 in {code for code, _ in ends}
        for code, errors in ends:
            assert code == 0 or "Refused" in errors, errors
        assert set(files(target)) == set(files(model))
        check_folder(target, threads=1)


FILLING = f"""{CALLED}
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for convert, given, whole in (
    (writer.pack_folder, source, {{packed}}), (writer.unpack_folder, {{bundle!r}}, {{plain}})
):
    for limit in (0, 1, 4096, whole // 2, whole - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            convert(Path(given), target / "x.safetensors", threads=2)
        except OSError as error:
            print(error.errno, [path.name for path in target.iterdir()])
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole, resource.RLIM_INFINITY))
    convert(Path(given), target / "x.safetensors", threads=2)
    print([path.name for path in target.iterdir()])
    (target / "x.safetensors").unlink()
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is the same error of the same calls."""
    path = bundle(tmp_path)
    plain = tmp_path / "plain.safetensors"
    code = FILLING.format(packed=path.stat().st_size, plain=plain.stat().st_size, bundle=str(path))
    with running(code, plain, tmp_path / "out") as process:
        output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert output.splitlines() == [*[f"{errno.EFBIG} []"] * 5, "['x.safetensors']"] * 2
