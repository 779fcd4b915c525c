"""Where clients are: headers of trusted proxies, and databases of both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.places import Places
from routing.geo import distance_km
from routing.region import Place
from tests.fakes.mmdb import mmdb

PARIS = Place(48.857, 2.352)
CITIES = {
    "203.0.113.0/24": {"location": {"latitude": 48.857, "longitude": 2.352}},
    "198.51.100.0/24": {"country": {"iso_code": "AU"}},
    "192.0.2.0/25": {"registered_country": {"iso_code": "NZ"}},
    "192.0.2.128/25": {"location": {"latitude": 1234.0, "longitude": 0.0}},
    "2001:db8::/32": {"country": {"iso_code": "JP"}, "continent": {"code": "AS"}},
    "100.64.0.0/10": {"names": ["somewhere"]},
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "cities.mmdb"
    path.write_bytes(mmdb(CITIES))
    return path


def near(place: Place | None, other: Place, km: float) -> bool:
    return place is not None and distance_km(place, other) < km


def test_headers_count_from_trusted_proxies_only() -> None:
    headers = {"cf-iplatitude": "48.857", "cf-iplongitude": "2.352"}
    assert Places().of("127.0.0.1", headers) == PARIS
    assert Places().of("::1", headers) == PARIS
    assert Places().of("192.0.2.1", headers) is None
    assert Places(["192.0.2.0/24"]).of("192.0.2.1", headers) == PARIS
    assert Places(["192.0.2.0/24"]).of("127.0.0.1", headers) is None
    assert Places().of(None, headers) is None


def test_a_country_is_somewhere_in_it() -> None:
    assert near(Places().of("127.0.0.1", {"cf-ipcountry": "fr"}), PARIS, 400)
    assert Places().of("127.0.0.1", {"cf-ipcountry": "T1"}) is None


def test_without_a_database_an_address_says_nothing() -> None:
    assert Places().of("203.0.113.7", {}) is None


def test_an_address_is_looked_up(database: Path) -> None:
    places = Places(database=database)
    assert places.of("203.0.113.7", {}) == PARIS
    assert near(places.of("198.51.100.7", {}), Place(-33.9, 151.2), 1000)
    assert near(places.of("192.0.2.1", {}), Place(-41.3, 174.8), 500)
    assert near(places.of("2001:db8::1", {}), Place(35.7, 139.7), 500)
    for nowhere in ("192.0.2.200", "8.8.8.8", "100.64.0.1", "127.0.0.1", "testclient"):
        assert places.of(nowhere, {}) is None
    places.close()


def test_a_trusted_proxy_names_the_client(database: Path) -> None:
    places = Places(["10.0.0.0/8"], database)
    assert places.of("10.0.0.1", {"x-forwarded-for": "203.0.113.7, 10.0.0.2"}) == PARIS
    assert places.of("10.0.0.1", {"cf-connecting-ip": "203.0.113.7"}) == PARIS
    assert places.of("8.8.8.8", {"x-forwarded-for": "203.0.113.7"}) is None
    places.close()


def test_malformed_headers_fall_back_to_the_address(database: Path) -> None:
    places = Places(["10.0.0.0/8"], database)
    headers = {"cf-iplatitude": "north", "cf-ipcountry": "??", "x-forwarded-for": "203.0.113.7"}
    assert places.of("10.0.0.1", headers) == PARIS
    places.close()


def test_a_database_of_ipv4_alone(tmp_path: Path) -> None:
    path = tmp_path / "four.mmdb"
    path.write_bytes(mmdb({"203.0.113.0/24": {"country": {"iso_code": "FR"}}}, ip_version=4))
    places = Places(database=path)
    assert near(places.of("203.0.113.7", {}), PARIS, 400)
    assert places.of("2001:db8::1", {}) is None
    places.close()


def test_what_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trusted_proxies: .*300"):
        Places(["10.0.0.0/300"])
    with pytest.raises(ValueError, match=r"geo_db: .*none\.mmdb cannot be read: No such file"):
        Places(database=tmp_path / "none.mmdb")
    (tmp_path / "bad.mmdb").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"geo_db: .*bad\.mmdb is no \.mmdb database"):
        Places(database=tmp_path / "bad.mmdb")
