"""A whole `fleet up` on stand-ins for its servers: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from routing.fleetfile import DATA
from routing.launch import choose_fleet
from routing.paths import paths
from routing.runs import NoFleet, RunningFleet, running_fleet
from tests.fakes.reading import read_to

PATIENCE_S = 60.0  # on a busy machine; nothing here waits so long when it goes well
STOP_S = 5.0 * 5  # five times what is promised: this machine has other work
GB = 10**9


@contextmanager
def launched(home: Path, *kinds: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.fakes.stand_in_fleet", str(home), *kinds]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


def running(home: Path) -> RunningFleet:
    """The fleet, as soon as its processes are started; also when they have ended since."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for file in (home / "state" / "run").glob("*/fleet.json"):
            return msgspec.json.decode(file.read_bytes(), type=RunningFleet)
        time.sleep(0.02)
    raise AssertionError("no fleet was started")


def alive(fleet: RunningFleet) -> list[str]:
    """Names of its processes that still run. A zombie that nobody has collected yet does not."""
    names = []
    for process in fleet.processes:
        try:
            if psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                names.append(process.name)
        except psutil.NoSuchProcess:
            pass
    return names


def wait_gone(fleet: RunningFleet) -> None:
    deadline = time.monotonic() + STOP_S
    while left := alive(fleet):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@pytest.mark.system
def test_once_prints_the_answer_and_stops(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0", "--once") as launcher:
        fleet = running(tmp_path)
        out, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
    assert not alive(fleet)
    assert out.startswith(f"Edge: {fleet.edge.url}\n")
    assert "It scatters light.\n" in out
    assert "served by weur" in out
    assert "usage: 7 prompt + 4 completion = 11 tokens" in out


@pytest.mark.system
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_it_stays_until_told_and_leaves_nobody(tmp_path: Path, told: signal.Signals) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0") as launcher:
        fleet = running(tmp_path)
        out = read_to(launcher, "token: ")
        assert len(alive(fleet)) == 2
        launcher.send_signal(told)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not alive(fleet)
    assert f"curl -N {fleet.edge.url}/client/v4/accounts/demo/ai/run/@cf/m" in out
    with pytest.raises(NoFleet):
        running_fleet(paths({"EDGEFIRE_HOME": str(tmp_path)}).state)


@pytest.mark.system
def test_a_second_ctrl_c_waits_for_no_answer(tmp_path: Path) -> None:
    """The first waits for the edge, which has something to do for ever; nobody else is told yet."""
    with launched(tmp_path, "edge-0=slow", "weur-both-0") as launcher:
        fleet = running(tmp_path)
        read_to(launcher, "token: ")
        launcher.send_signal(signal.SIGINT)
        assert launcher.stderr is not None
        while "Stopping" not in (line := launcher.stderr.readline()):
            assert line
        assert alive(fleet) == ["edge-0", "weur-both-0"]
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not alive(fleet)


@pytest.mark.slow
@pytest.mark.system
def test_it_waits_no_longer_than_the_fleets_grace(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0=slow", "weur-both-0", "--grace-s=0.5") as launcher:
        fleet = running(tmp_path)
        read_to(launcher, "token: ")
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not alive(fleet)


@pytest.mark.system
def test_ctrl_c_while_starting_leaves_nobody(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0=never-ready") as launcher:
        fleet = running(tmp_path)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 130
    assert not alive(fleet)


@pytest.mark.system
def test_a_folder_that_takes_no_more_ends_nothing(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0") as launcher:
        fleet = running(tmp_path)
        read_to(launcher, "token: ")
        latest = tmp_path / "state" / "run" / "latest"
        latest.unlink()
        (latest / "in the way").mkdir(parents=True)
        psutil.Process(fleet.processes[1].pid).kill()
        assert launcher.stderr is not None
        while "cannot be written" not in (line := launcher.stderr.readline()):
            assert line
        assert launcher.poll() is None
        assert not list(latest.parent.glob(".latest.*"))
        shutil.rmtree(latest)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not alive(fleet)


@pytest.mark.system
def test_processes_do_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0") as launcher:
        fleet = running(tmp_path)
        read_to(launcher, "token: ")
        launcher.kill()
        launcher.wait()
        wait_gone(fleet)


@pytest.mark.system
def test_a_death_while_starting_ends_the_rest(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0", "weur-both-0=dies") as launcher:
        fleet = running(tmp_path)
        out, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 1
    assert not alive(fleet)
    assert out == ""
    assert "weur-both-0 ended while starting (exit code 1)" in err
    assert "no weights here" in err


@pytest.mark.system
def test_an_answer_cut_short_is_a_failure(tmp_path: Path) -> None:
    with launched(tmp_path, "edge-0=truncates", "weur-both-0") as launcher:
        _, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 1
    assert "without [DONE]" in err


@pytest.mark.parametrize(
    ("free_bytes", "name"),
    [(None, "fleet.toml"), (8 * GB, "fleet.toml"), (8 * GB - 1, "single.toml")],
)
def test_little_memory_means_one_worker(free_bytes: int | None, name: str) -> None:
    path, said = choose_fleet(None, free_bytes)
    assert path == DATA / name
    assert (said is not None) == (name == "single.toml")


def test_a_fleet_that_was_asked_for_is_not_second_guessed() -> None:
    assert choose_fleet(Path("mine.toml"), 1) == (Path("mine.toml"), None)
