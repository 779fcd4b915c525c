"""The fleet file: what is read, and how what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

import edge.settings as edge_settings
from routing.fleetfile import (
    DATA,
    EDGE_READS,
    FleetFileError,
    known_places,
    place_of,
    read_fleet,
    resolved,
)
from routing.region import Place

HEAD = '[fleet]\nmodel = "m"\n'
VECTORS = "@cf/sentence-transformers/all-minilm-l6-v2"
BOTH = '[[region.worker]]\nrole = "both"\n'


def test_the_default_fleet_is_two_regions_that_prefill_and_decode_apart() -> None:
    fleet = read_fleet(DATA / "fleet.toml")
    assert [region.name for region in fleet.regions] == ["weur", "enam"]
    for region in fleet.regions:
        assert [(worker.role, worker.count, worker.model) for worker in region.workers] == [
            ("prefill", 1, None),
            ("decode", 1, None),
            ("both", 1, VECTORS),
        ]


def test_the_single_fleet_is_one_worker() -> None:
    (region,) = read_fleet(DATA / "single.toml").regions
    assert [worker.role for worker in region.workers] == ["both"]


def test_a_known_name_needs_no_coordinates_and_own_ones_win(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    here = "latitude = 1.5\nlongitude = -2.5\n"
    path.write_text(f'{HEAD}[[region]]\nname = "weur"\n{BOTH}[[region]]\nname = "oc"\n{here}{BOTH}')
    known, own = read_fleet(path).regions
    weur = known_places()["weur"]
    assert place_of(known) == Place(weur.latitude, weur.longitude)
    assert place_of(own) == Place(1.5, -2.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "not TOML"),
        (HEAD, "missing required field `region`"),
        (f'{HEAD}[[region]]\nname = "weur"\n', "region 1 (weur): object missing required field"),
        (f'{HEAD}[[region]]\nname = "We Eu"\n{BOTH}', "region 1 (We Eu): name: "),
        (f'{HEAD}[[region]]\nname = "weur"\nport = 70000\n{BOTH}', "region 1 (weur): port: "),
        (
            f'{HEAD}[[region]]\nname = "weur"\n{BOTH}'
            '[[region.worker]]\nrole = "prefill"\nmodel = "@cf/b/v"\n',
            "region 1 (weur): worker: none of @cf/b/v has role decode or both",
        ),
        (f'{HEAD}[edge]\nprt = 1\n[[region]]\nname = "weur"\n{BOTH}', "edge: object contains"),
        (
            f'{HEAD}[[region]]\nname = "oc"\n{BOTH}[[region]]\nname = "me"\n'
            f'{BOTH}[[region.worker]]\nrole = "chef"\n',
            "region 2 (me): worker 2 (chef): role: invalid enum value 'chef'",
        ),
        (f'{HEAD}[[region]]\nname = "mars"\n{BOTH}', "region 1 (mars): latitude: needed"),
        (
            f'{HEAD}[[region]]\nname = "weur"\nlatitude = 3\n{BOTH}',
            "region 1 (weur): latitude and longitude go together",
        ),
        (
            f'{HEAD}[[region]]\nname = "weur"\n{BOTH}[[region]]\nname = "weur"\n{BOTH}',
            "region 2 (weur): name: used by a region above",
        ),
        (
            f'{HEAD}[[region]]\nname = "weur"\n[[region.worker]]\nrole = "prefill"\n',
            "region 1 (weur): worker: none has role decode or both",
        ),
        (
            f'{HEAD}[[region]]\nname = "weur"\n[[region.worker]]\nrole = "decode"\n',
            "region 1 (weur): worker: none has role prefill or both",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_row_and_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(FleetFileError) as failure:
        read_fleet(path)
    assert str(failure.value).startswith(f"{path}: ")
    assert said in str(failure.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match=r"gone\.toml: cannot be read"):
        read_fleet(tmp_path / "gone.toml")


def test_an_edge_reads_what_the_launcher_resolved(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    edge = "[edge]\nport = 1\nbudget_s = 5.0\n"
    path.write_text(f'{HEAD}{edge}[[region]]\nname = "weur"\n{BOTH}')
    given = tmp_path / "resolved.json"
    given.write_bytes(resolved(read_fleet(path), {"weur": "http://127.0.0.1:9"}))
    seen = edge_settings.read_fleet(given)
    (region,) = seen.regions
    assert (region.name, region.url) == ("weur", "http://127.0.0.1:9")
    assert region.place == place_of(read_fleet(path).regions[0])
    assert seen.edge.budget_s == 5.0


@pytest.mark.parametrize(
    ("of_fleet", "of_edge", "told"),
    [("", "", 30.0), ("grace_s = 90\n", "", 90.0), ("grace_s = 90\n", "grace_s = 5\n", 5.0)],
)
def test_an_edge_has_the_fleets_grace_or_its_own(
    tmp_path: Path, of_fleet: str, of_edge: str, told: float
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(f'{HEAD}{of_fleet}[edge]\n{of_edge}[[region]]\nname = "weur"\n{BOTH}')
    given = tmp_path / "resolved.json"
    given.write_bytes(resolved(read_fleet(path), {"weur": "http://127.0.0.1:9"}))
    assert edge_settings.read_fleet(given).edge.grace_s == told


def test_what_the_launcher_passes_on_is_what_an_edge_reads() -> None:
    assert set(EDGE_READS) == set(edge_settings.EdgeTable.__struct_fields__)
