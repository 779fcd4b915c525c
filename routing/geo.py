"""Places on the globe: how far apart, and where a client is. Pure: no files, no sockets.

A client's place comes, best first, from the coordinates that a proxy states, from the country that
it states, or from the client's address and a database that the caller holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from math import asin, cos, isfinite, radians, sin, sqrt

from routing.region import Place

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG
LOOPBACK = ("127.0.0.0/8", "::1/128")


def distance_km(a: Place, b: Place) -> float:
    """Great-circle distance (haversine), in kilometres."""
    phi_a, phi_b = radians(a.latitude), radians(b.latitude)
    half_dphi = (phi_b - phi_a) / 2
    half_dlambda = radians(b.longitude - a.longitude) / 2
    h = sin(half_dphi) ** 2 + cos(phi_a) * cos(phi_b) * sin(half_dlambda) ** 2
    return 2 * EARTH_RADIUS_KM * asin(sqrt(min(1.0, h)))


def parse_coordinates(latitude: str, longitude: str) -> Place | None:
    """A place from two decimal numbers; None when either is not a number on the globe."""
    try:
        place = Place(float(latitude), float(longitude))
    except ValueError:
        return None
    return place if on_globe(place) else None


def on_globe(place: Place) -> bool:
    """Whether both coordinates are finite and in range (NaN and infinity parse as floats)."""
    return (
        isfinite(place.latitude)
        and isfinite(place.longitude)
        and abs(place.latitude) <= 90
        and abs(place.longitude) <= 180
    )


def parse_countries(table: Mapping[str, Sequence[float]]) -> dict[str, Place]:
    """The country table, `{"DE": [50.9, 10.0]}`, as places."""
    return {code: Place(latitude, longitude) for code, (latitude, longitude) in table.items()}


def stated_place(headers: Mapping[str, str], countries: Mapping[str, Place]) -> Place | None:
    """What a proxy's `cf-ip*` headers say; malformed or unknown values count as not said."""
    place = parse_coordinates(headers.get("cf-iplatitude", ""), headers.get("cf-iplongitude", ""))
    return place or countries.get(headers.get("cf-ipcountry", "").strip().upper())


def parse_address(text: str | None) -> Address | None:
    """An IP address, an IPv4-mapped IPv6 one as IPv4; None for anything else."""
    try:
        address = ip_address((text or "").strip())
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class TrustedProxies:
    """The peers whose word about a client counts."""

    def __init__(self, networks: Iterable[str] = LOOPBACK) -> None:
        """ValueError on what is not an address or CIDR."""
        self._networks: tuple[Network, ...] = tuple(ip_network(text) for text in networks)

    def trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def client_of(self, peer: str | None, headers: Mapping[str, str]) -> Address | None:
        """The address of the client behind `peer`.

        From a trusted peer: `cf-connecting-ip`, else the last address of `x-forwarded-for` that is
        not itself a trusted proxy: what stands to the left of it is only the client's word.
        """
        address = parse_address(peer)
        if not self.trusts(address):
            return address
        if stated := parse_address(headers.get("cf-connecting-ip")):
            return stated
        for hop in reversed(headers.get("x-forwarded-for", "").split(",")):
            stated = parse_address(hop)
            if stated is None:
                break
            address = stated
            if not self.trusts(stated):
                break
        return address
