"""Writes small .mmdb files, after MaxMind's description of the format, version 2.0."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

_MARKER = b"\xab\xcd\xefMaxMind.com"
_EMPTY = -1


class _Uint16(int):
    pass


class _Uint64(int):
    pass


def mmdb(rows: Mapping[str, Any], *, ip_version: int = 6, kind: str = "Test-City") -> bytes:
    """A database that gives each network its value."""
    nodes: list[list[int]] = [[_EMPTY, _EMPTY]]
    leaves: list[tuple[int, int, int]] = []  # node, side, offset of its value
    data = b""
    for text, value in rows.items():
        network = ip_network(text)
        node, bits = 0, _bits(network, ip_version)
        for bit in bits[:-1]:
            if nodes[node][bit] == _EMPTY:
                nodes.append([_EMPTY, _EMPTY])
                nodes[node][bit] = len(nodes) - 1
            node = nodes[node][bit]
        leaves.append((node, bits[-1], len(data)))
        data += _encode(value)
    count = len(nodes)
    for pair in nodes:
        pair[:] = [count if child == _EMPTY else child for child in pair]
    for node, side, offset in leaves:
        nodes[node][side] = count + 16 + offset
    tree = b"".join(child.to_bytes(3, "big") for pair in nodes for child in pair)
    metadata = {
        "binary_format_major_version": _Uint16(2),
        "binary_format_minor_version": _Uint16(0),
        "build_epoch": _Uint64(1),
        "database_type": kind,
        "description": {},
        "ip_version": _Uint16(ip_version),
        "languages": [],
        "node_count": count,
        "record_size": _Uint16(24),
    }
    return tree + bytes(16) + data + _MARKER + _encode(metadata)


def _bits(network: IPv4Network | IPv6Network, ip_version: int) -> list[int]:
    """An IPv4 network lies under ::/96 in a database of IPv6."""
    pad = 96 if network.version < ip_version else 0
    width = network.max_prefixlen
    address = int(network.network_address)
    own = [(address >> (width - 1 - at)) & 1 for at in range(network.prefixlen)]
    return [0] * pad + own


def _encode(value: Any) -> bytes:
    match value:
        case str():
            text = value.encode()
            return bytes([2 << 5 | len(text)]) + text
        case float():
            return bytes([3 << 5 | 8]) + struct.pack(">d", value)
        case _Uint16():
            return bytes([5 << 5 | 2]) + value.to_bytes(2, "big")
        case _Uint64():
            return bytes([8, 9 - 7]) + value.to_bytes(8, "big")
        case int():
            return bytes([6 << 5 | 4]) + value.to_bytes(4, "big")  # uint32
        case dict():
            pairs = b"".join(_encode(key) + _encode(one) for key, one in value.items())
            return bytes([7 << 5 | len(value)]) + pairs
        case list():
            return bytes([len(value), 11 - 7]) + b"".join(map(_encode, value))
    raise TypeError(value)
