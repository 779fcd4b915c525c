"""The fleet file: what is read, and how what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from routing.fleetfile import (
    DATA,
    FleetFileError,
    known_places,
    place_of,
    read_fleet,
    read_regions,
    resolved,
)
from routing.region import Place, Region

HEAD = '[fleet]\nmodel = "m"\n'
BOTH = '[[region.worker]]\nrole = "both"\n'


def test_the_default_fleet_is_two_regions_that_prefill_and_decode_apart() -> None:
    fleet = read_fleet(DATA / "fleet.toml")
    assert [region.name for region in fleet.regions] == ["weur", "enam"]
    for region in fleet.regions:
        assert [(worker.role, worker.count) for worker in region.workers] == [
            ("prefill", 1),
            ("decode", 1),
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
    regions = (
        Region(name="weur", url="http://127.0.0.1:1", place=Place(52.37, 4.9)),
        Region(name="enam", url="http://127.0.0.1:2", place=Place(39.0, -77.49)),
    )
    path = tmp_path / "resolved.toml"
    path.write_text(resolved(regions))
    assert read_regions(path) == regions


def test_a_region_without_url_is_no_region_for_an_edge() -> None:
    with pytest.raises(FleetFileError, match=r"region 1 \(weur\): object missing required field"):
        read_regions(DATA / "fleet.toml")
