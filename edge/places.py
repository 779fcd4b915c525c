"""Where a client is: what trusted proxies say of it, else what the operator's database knows.

The database is any .mmdb file in MaxMind's schema, of countries or cities; without one an address
says nothing. What counts as said is decided in `routing.geo`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

import maxminddb

from routing.geo import (
    LOOPBACK,
    Address,
    TrustedProxies,
    on_globe,
    parse_address,
    parse_countries,
    stated_place,
)
from routing.region import Place


class Places:
    def __init__(self, trusted: Iterable[str] = LOOPBACK, database: Path | None = None) -> None:
        """ValueError that names the setting, on a malformed network or a database that is none."""
        try:
            self._trusted = TrustedProxies(trusted)
        except ValueError as exc:
            raise ValueError(f"trusted_proxies: {exc}") from exc
        table = tomllib.loads((files("routing") / "data" / "countries.toml").read_text())
        self._countries = parse_countries(table)
        self._database = _open(database) if database else None
        self._ip_versions = {self._database.metadata().ip_version, 4} if self._database else set()

    def of(self, peer: str | None, headers: Mapping[str, str]) -> Place | None:
        """The place of the client that `peer` is, or stands for; None when nothing tells."""
        if self._trusted.trusts(parse_address(peer)) and (
            place := stated_place(headers, self._countries)
        ):
            return place
        return self._look_up(self._trusted.client_of(peer, headers))

    def close(self) -> None:
        if self._database:
            self._database.close()

    def _look_up(self, address: Address | None) -> Place | None:
        if self._database is None or address is None or address.version not in self._ip_versions:
            return None
        match self._database.get(address):
            case {"location": {"latitude": float() as latitude, "longitude": float() as longitude}}:
                place = Place(latitude, longitude)
                return place if on_globe(place) else None
            case {"country": {"iso_code": str() as country}}:
                return self._countries.get(country)
            case {"registered_country": {"iso_code": str() as country}}:
                return self._countries.get(country)
        return None


def _open(path: Path) -> maxminddb.Reader:
    try:
        return maxminddb.open_database(path)
    except OSError as exc:
        raise ValueError(f"geo_db: {path} cannot be read: {exc.strerror}") from exc
    except maxminddb.InvalidDatabaseError as exc:
        raise ValueError(f"geo_db: {path} is no .mmdb database: {exc}") from exc
