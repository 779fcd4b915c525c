"""Which addresses an edge may call for a client: those that anyone on the Internet could.

A client that names a URL must not reach through the edge what only the edge can: its own machine,
its network, a cloud's metadata. So the name is resolved once, every address of it is looked at, and
the call goes to one of those, not to what the name says a moment later.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import anyio
import httpx2
from anyio import CapacityLimiter, to_thread

from edge.checks import BadField

_MOST_CHARS = 2048
_MOST_PORT = 65_535
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: reaches the IPv4 address that is in its end
RESOLVE_S = 5.0


class NotPublic(Exception):
    """A URL that leads where a client may not be led."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, and the address to connect to for it."""

    url: httpx2.URL
    address: str

    def request(
        self, client: httpx2.AsyncClient, body: bytes, headers: dict[str, str]
    ) -> httpx2.Request:
        """A POST to that address. TLS still asks for the certificate of the name."""
        host = self.url.netloc.decode("ascii")
        return client.build_request(
            "POST",
            self.url.copy_with(host=self.address),
            content=body,
            headers={**headers, "host": host},
            extensions={"sni_hostname": self.url.host},
        )


def checked_url(text: str, pointer: str) -> str:
    """A URL that could be called; raises BadField naming `pointer`."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    good = url.scheme in {"http", "https"} and url.host and not url.userinfo
    good = good and (url.port is None or 0 < url.port <= _MOST_PORT)
    if not good or len(text) > _MOST_CHARS:
        says = f"'{pointer}' must be an http or https URL of at most {_MOST_CHARS} characters"
        raise BadField(pointer, says)
    return text


async def target(text: str, *, allow_private: bool) -> Target:
    """Where `text` leads. Raises NotPublic, and OSError where its name is not known."""
    url = httpx2.URL(text)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    look_up = partial(socket.getaddrinfo, url.raw_host, port, type=socket.SOCK_STREAM)
    with anyio.fail_after(RESOLVE_S):
        # Not in the few threads of the loop, which looks up the names of regions there.
        found = await to_thread.run_sync(
            look_up, limiter=CapacityLimiter(1), abandon_on_cancel=True
        )
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    for address in addresses:
        if not allow_private and not is_public(address):
            raise NotPublic(f"{url.host} is at {address}, which is not a public address")
    return Target(url, addresses[0])


def is_public(address: str) -> bool:
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour or ip.teredo or ip in _NAT64:  # an IPv4 address in disguise
            return False
    return ip.is_global and not ip.is_multicast
