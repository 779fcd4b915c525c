"""Where an edge's settings come from, and what is said of a fleet file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge.settings import Settings, read_fleet, settings_of
from routing.region import Place, Region

ROW = {"name": "weur", "url": "http://127.0.0.1:9", "latitude": 52.4, "longitude": 4.9}
TOML = """
[fleet]
model = "m"

[edge]
port = 8787
budget_s = 20
trusted_proxies = ["10.0.0.0/8"]
geo_db = "~/cities.mmdb"

[[region]]
name = "weur"
url = "http://127.0.0.1:9"
latitude = 52.4
longitude = 4.9
"""


def made(path: Path, **flags: Any) -> Settings:
    given = {"secret": "s", "keys_dir": Path("k"), "cache_dir": Path("c")}
    return settings_of(read_fleet(path), flags, **given)


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(TOML)
    settings = made(path, max_output_tokens=9)
    assert settings.regions == (
        Region(name="weur", url="http://127.0.0.1:9", place=Place(52.4, 4.9)),
    )
    assert (settings.budget_s, settings.max_output_tokens) == (20.0, 9)
    assert settings.trusted_proxies == ("10.0.0.0/8",)
    assert settings.geo_db == Path("~/cities.mmdb").expanduser()
    assert settings.body_limit_bytes == 10_000_000
    assert made(path, budget_s=5.0).budget_s == 5.0


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://Example.com"])
def test_an_origin_that_no_browser_sends_is_named(tmp_path: Path, origin: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(TOML)
    with pytest.raises(ValueError, match=f"cors_origins: '{origin}' is not"):
        made(path, cors_origins=(origin,))
    good = ("*", "null", "http://127.0.0.1:3000", "https://a.example", "chrome-extension://abc")
    assert made(path, cors_origins=good).cors_origins == good


def test_json_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "edge.json"
    path.write_text(json.dumps({"edge": {"trusted_proxies": []}, "region": [ROW]}))
    settings = made(path)
    assert settings.trusted_proxies == ("127.0.0.0/8", "::1/128")
    assert settings.regions[0].name == "weur"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "region"),
        ({"region": []}, "region"),
        ({"region": [{**ROW, "latitude": 91}]}, r"region\[0\].latitude"),
        ({"region": [{key: ROW[key] for key in ROW if key != "url"}]}, "url"),
        ({"region": [{**ROW, "url": "127.0.0.1:9"}]}, r"region\[0\].url"),
        ({"region": [ROW, ROW]}, "same name"),
        ({"region": [ROW], "edge": {"budget_s": 0}}, "edge.budget_s"),
    ],
)
def test_a_wrong_fleet_file_names_what_is_wrong(
    tmp_path: Path, table: dict[str, Any], says: str
) -> None:
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=says) as raised:
        read_fleet(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        read_fleet(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("[[region")
    with pytest.raises(ValueError, match=r"bad\.toml"):
        read_fleet(tmp_path / "bad.toml")
