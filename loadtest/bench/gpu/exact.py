"""Packing, decoding and look-up on the device, bit for bit."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from unweight.gpu.pack import pack_on_device
from unweight.gpu.rest import Resting
from unweight.gpu.rows import take_rows
from unweight.gpu.scratch import unpack_on_device
from unweight.gpu.timing import time_us
from unweight.gpu.weight import DeviceTiles
from unweight.tiles import pack_tiles

_HOST_WEIGHTS = 1 << 25  # up to this many are also packed on the host, to compare


def check_exact(name: str, dense: Tensor) -> str:
    """What was found and how long it took; raises `AssertionError` for a bit that differs."""
    tiles = pack_on_device(dense)
    room = torch.empty_like(dense)
    assert _same(unpack_on_device(tiles, out=room), dense), name
    generator = torch.Generator(dense.device).manual_seed(7)
    ids = torch.randint(len(dense), (33,), generator=generator, device=dense.device)
    assert _same(take_rows(tiles, ids), dense[ids]), name
    if dense.numel() <= _HOST_WEIGHTS:
        _check_host(tiles, dense)
    decode_us = time_us(lambda _: unpack_on_device(tiles, out=room), num_copies=2)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    pack_on_device(dense)
    end.record()
    end.synchronize()
    return (
        f"{name}: exact; {tiles.num_bytes / dense.nbytes:.4%} of BF16, "
        f"{len(tiles.exceptions)} exceptions; decoding {decode_us:.1f} us "
        f"({(tiles.num_bytes + dense.nbytes) / decode_us / 1e6:.2f} TB/s), "
        f"packing {dense.nbytes / begin.elapsed_time(end) / 1e6:.0f} GB/s"
    )


def check_rest(name: str, dense: Tensor, threads: int) -> str:
    """The same of a matrix that has slept."""
    resting = Resting.of(pack_on_device(dense), threads=threads)
    resting.wake()
    began = time.monotonic()
    tiles = resting.wake()
    torch.cuda.synchronize()
    took = time.monotonic() - began
    assert _same(unpack_on_device(tiles), dense), name
    return (
        f"{name} at rest: {resting.num_bytes / dense.nbytes:.2%} of BF16, awake after "
        f"{took * 1e3:.1f} ms ({dense.nbytes / took / 1e9:.1f} GB/s of BF16, {threads} threads)"
    )


def _check_host(tiles: DeviceTiles, dense: Tensor) -> None:
    host = pack_tiles(dense.cpu().view(torch.int16).numpy().view("uint16"), threads=8)
    own = tiles.to_host()
    for array in ("words", "base", "ptr", "exceptions"):
        assert (getattr(host, array) == getattr(own, array)).all(), array


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
