"""The command lines of a fleet: whom each process is told of, and what is left to its defaults."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import edge.settings as edge_settings
from routing.children import Command
from routing.fleetfile import DATA, FleetFileError, read_fleet
from routing.layout import Ground, lay_out
from routing.ledgers import found_files

VECTORS = "@cf/sentence-transformers/all-minilm-l6-v2"
Say = Callable[[str], None]


@pytest.fixture
def ground(tmp_path: Path) -> Callable[[Say], Ground]:
    def make(say: Say = lambda _: None) -> Ground:
        return Ground(
            folder=tmp_path,
            keys_dir=tmp_path / "keys",
            cache_dir=tmp_path / "cache",
            model_dir=tmp_path / "model",
            other_dirs={VECTORS: tmp_path / "vectors"},
            usage_dir=tmp_path / "usage",
            device="cpu",
            cores=2,
            say=say,
        )

    return make


def flag(command: Command, name: str) -> list[str]:
    """Every value given to a flag."""
    words = command.words
    return [words[i + 1] for i, word in enumerate(words) if word == f"--{name}"]


def close(commands: list[Command]) -> None:
    for command in commands:
        command.listener.close()


def test_the_default_fleet_is_nine_processes(ground: Callable[..., Ground]) -> None:
    commands = lay_out(read_fleet(DATA / "fleet.toml"), ground())
    assert [(command.name, command.region, command.role) for command in commands] == [
        ("edge-0", "", "edge"),
        ("weur-front", "weur", "front"),
        ("weur-prefill-0", "weur", "prefill"),
        ("weur-decode-0", "weur", "decode"),
        ("weur-all-minilm-l6-v2-0", "weur", "both"),
        ("enam-front", "enam", "front"),
        ("enam-prefill-0", "enam", "prefill"),
        ("enam-decode-0", "enam", "decode"),
        ("enam-all-minilm-l6-v2-0", "enam", "both"),
    ]
    close(commands)


def test_a_front_knows_its_own_workers_and_the_edge_every_front(
    ground: Callable[..., Ground],
) -> None:
    given = ground()
    commands = lay_out(read_fleet(DATA / "fleet.toml"), given)
    by_name = {command.name: command for command in commands}
    assert flag(by_name["enam-front"], "worker") == [
        f"enam-prefill-0=prefill@{by_name['enam-prefill-0'].url}",
        f"enam-decode-0=decode@{by_name['enam-decode-0'].url}",
        f"enam-all-minilm-l6-v2-0=both@{by_name['enam-all-minilm-l6-v2-0'].url}",
    ]
    (edge_file,) = flag(by_name["edge-0"], "fleet")
    assert {region.url for region in edge_settings.read_fleet(Path(edge_file)).regions} == {
        by_name["weur-front"].url,
        by_name["enam-front"].url,
    }
    close(commands)


def test_edge_and_fronts_keep_usage_in_files_that_reconciliation_finds(
    tmp_path: Path, ground: Callable[..., Ground]
) -> None:
    commands = lay_out(read_fleet(DATA / "fleet.toml"), ground())
    usage = tmp_path / "usage"
    ledgers = [Path(path) for command in commands for path in flag(command, "ledger")]
    journals = [Path(path) for command in commands for path in flag(command, "journal")]
    assert ledgers == [usage / "ledger.sqlite"]
    assert [path for command in commands for path in flag(command, "store")] == [
        str(usage / "store.sqlite")
    ]
    assert [path.name for path in journals] == [
        "journal-weur-front.sqlite",
        "journal-enam-front.sqlite",
    ]
    usage.mkdir()
    for path in (*ledgers, *journals):
        path.touch()
    assert found_files(usage) == (ledgers, sorted(journals))
    close(commands)


def test_a_worker_is_told_what_its_row_says_and_no_more(
    tmp_path: Path, ground: Callable[..., Ground]
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[fleet]\nmodel = "@cf/m"\n[edge]\nport = 0\n[[region]]\nname = "oc"\n'
        '[[region.worker]]\nrole = "both"\ncount = 2\nkv_tokens = 4096\nlease_s = 2.5\n'
        'kv_ways = "nixl,tcp"\n'
        '[[region.worker]]\nrole = "both"\ndevice = "cuda"\nthreads = 7\n'
    )
    commands = lay_out(read_fleet(path), ground())
    workers = commands[2:]
    assert [worker.name for worker in workers] == ["oc-both-0", "oc-both-1", "oc-both-2"]
    assert [flag(worker, "kv-tokens") for worker in workers] == [["4096"], ["4096"], []]
    assert [flag(worker, "lease-s") for worker in workers] == [["2.5"], ["2.5"], []]
    assert [flag(worker, "kv-ways") for worker in workers] == [["nixl,tcp"], ["nixl,tcp"], []]
    assert [flag(worker, "device") for worker in workers] == [["cpu"], ["cpu"], ["cuda"]]
    assert [flag(worker, "threads") for worker in workers] == [["2"], ["2"], ["7"]]
    assert [flag(it, "grace-s") for it in commands[1:]] == [["30.0"]] * 4
    assert len({worker.url for worker in workers}) == 3
    close(commands)


def test_a_worker_may_have_a_model_of_its_own(
    tmp_path: Path, ground: Callable[..., Ground]
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[fleet]\nmodel = "@cf/a/m"\n[edge]\nport = 0\n[[region]]\nname = "oc"\n'
        '[[region.worker]]\nrole = "both"\nmodel = "@cf/b/vectors"\ncount = 2\n'
        '[[region.worker]]\nrole = "both"\nmodel = "@cf/a/m"\n'
    )
    fleet = read_fleet(path)
    assert fleet.other_models == ["@cf/b/vectors"]
    others = {"@cf/b/vectors": tmp_path / "vectors"}
    commands = lay_out(fleet, replace(ground(), other_dirs=others))
    workers = commands[2:]
    assert [(it.name, it.other_model) for it in workers] == [
        ("oc-vectors-0", "@cf/b/vectors"),
        ("oc-vectors-1", "@cf/b/vectors"),
        ("oc-both-0", None),
    ]
    assert [flag(it, "model") for it in workers] == [["@cf/b/vectors"]] * 2 + [["@cf/a/m"]]
    folders = [str(tmp_path / name) for name in ("vectors", "vectors", "model")]
    assert [flag(it, "model-dir") for it in workers] == [[it] for it in folders]
    assert f"oc-vectors-0=both@{workers[0].url}" in flag(commands[1], "worker")
    close(commands)


def test_a_port_in_use_is_said_with_the_one_taken(
    tmp_path: Path, ground: Callable[..., Ground]
) -> None:
    said: list[str] = []
    path = tmp_path / "fleet.toml"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        path.write_text(
            f'[fleet]\nmodel = "@cf/m"\n[edge]\nport = {port}\n[[region]]\nname = "oc"\n'
            '[[region.worker]]\nrole = "both"\n'
        )
        commands = lay_out(read_fleet(path), ground(said.append))
    taken = commands[0].url.rpartition(":")[2]
    assert said == [f"Port {port} is in use: the edge listens on {taken}"]
    close(commands)


def test_a_host_that_is_not_ours_is_named_with_its_field(
    tmp_path: Path, ground: Callable[..., Ground]
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[fleet]\nmodel = "@cf/m"\n[edge]\nhost = "192.0.2.7"\n[[region]]\nname = "oc"\n'
        '[[region.worker]]\nrole = "both"\n'
    )
    with pytest.raises(FleetFileError, match=r"edge: host: .*192\.0\.2\.7"):
        lay_out(read_fleet(path), ground())
