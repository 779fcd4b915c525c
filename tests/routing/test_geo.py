"""Places: distances that an atlas gives, and what a client may claim of itself."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import pytest

from routing.geo import (
    TrustedProxies,
    distance_km,
    on_globe,
    parse_address,
    parse_coordinates,
    parse_countries,
    stated_place,
)
from routing.region import Place

PARIS, NEW_YORK, SYDNEY = Place(48.857, 2.352), Place(40.713, -74.006), Place(-33.869, 151.209)
COUNTRIES = {"FR": Place(47.0, 2.5)}


@pytest.mark.parametrize(
    ("a", "b", "km"),
    [(PARIS, NEW_YORK, 5837), (PARIS, SYDNEY, 16960), (NEW_YORK, SYDNEY, 15990)],
)
def test_distances_are_those_of_an_atlas(a: Place, b: Place, km: float) -> None:
    assert distance_km(a, b) == pytest.approx(km, rel=0.005)


def test_distance_is_a_metric() -> None:
    rng = random.Random(1)

    def anywhere() -> Place:
        return Place(rng.uniform(-90, 90), rng.uniform(-180, 180))

    for _ in range(1000):
        a, b, c = anywhere(), anywhere(), anywhere()
        assert distance_km(a, a) == 0
        assert distance_km(a, b) == pytest.approx(distance_km(b, a))
        assert distance_km(a, c) <= distance_km(a, b) + distance_km(b, c) + 1e-6
        assert distance_km(a, b) <= 20016  # half the way round


def test_the_date_line_is_not_far() -> None:
    assert distance_km(Place(0, 179.5), Place(0, -179.5)) == pytest.approx(111.2, abs=0.1)


def test_antipodes_do_not_overflow() -> None:
    assert distance_km(Place(37.1, 12.3), Place(-37.1, -167.7)) == pytest.approx(20015, abs=1)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [("", ""), ("48", ""), ("x", "2"), ("nan", "2"), ("inf", "2"), ("90.1", "0"), ("0", "-180.5")],
)
def test_malformed_coordinates_count_as_not_said(latitude: str, longitude: str) -> None:
    headers = {"cf-iplatitude": latitude, "cf-iplongitude": longitude, "cf-ipcountry": "FR"}
    assert parse_coordinates(latitude, longitude) is None
    assert stated_place(headers, COUNTRIES) == COUNTRIES["FR"]


def test_coordinates_go_before_the_country() -> None:
    headers = {"cf-iplatitude": "40.7", "cf-iplongitude": "-74", "cf-ipcountry": "FR"}
    assert stated_place(headers, COUNTRIES) == Place(40.7, -74.0)


@pytest.mark.parametrize("country", ["", "XX", "T1", "France"])
def test_an_unknown_country_is_no_place(country: str) -> None:
    assert stated_place({"cf-ipcountry": country}, COUNTRIES) is None


def test_every_row_of_the_country_table_is_on_the_globe() -> None:
    table = tomllib.loads(Path("routing/data/countries.toml").read_text())
    countries = parse_countries(table)
    assert len(countries) >= 249
    assert all(len(code) == 2 and code.isupper() for code in countries)
    assert all(on_globe(place) for place in countries.values())
    assert distance_km(countries["FR"], PARIS) < 300
    assert distance_km(countries["NZ"], SYDNEY) < 2500


@pytest.mark.parametrize("text", [None, "", "testclient", "1.2.3", "1.2.3.4:80"])
def test_what_is_no_address_is_none(text: str | None) -> None:
    assert parse_address(text) is None


def test_only_a_trusted_peer_may_speak_of_its_client() -> None:
    trusted = TrustedProxies(["10.0.0.0/8"])
    headers = {"cf-connecting-ip": "203.0.113.7", "x-forwarded-for": "203.0.113.8"}
    assert trusted.client_of("198.51.100.1", headers) == parse_address("198.51.100.1")
    assert trusted.client_of("10.1.2.3", headers) == parse_address("203.0.113.7")
    assert trusted.client_of(None, headers) is None


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.8", "203.0.113.8"),
        ("1.1.1.1, 203.0.113.8, 10.9.9.9", "203.0.113.8"),  # 1.1.1.1 is only the client's word
        ("10.5.5.5, 10.9.9.9", "10.5.5.5"),
        ("203.0.113.8, nonsense, 10.9.9.9", "10.9.9.9"),
        ("", "10.1.2.3"),
    ],
)
def test_the_client_is_the_last_hop_that_is_no_proxy(forwarded: str, client: str) -> None:
    trusted = TrustedProxies(["10.0.0.0/8"])
    found = trusted.client_of("10.1.2.3", {"x-forwarded-for": forwarded})
    assert found == parse_address(client)


def test_loopback_is_trusted_unless_said_otherwise() -> None:
    for peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert TrustedProxies().trusts(parse_address(peer))
    assert not TrustedProxies().trusts(parse_address("10.0.0.1"))
    assert not TrustedProxies([]).trusts(parse_address("127.0.0.1"))
