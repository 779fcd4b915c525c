"""Packing, decoding and look-up on the device, bit for bit what numpy does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.unweight.gpu.matrices import DEVICE, as_tensor, bits, gaussian, hard
from unweight.gpu.pack import pack_on_device, pack_planes_on_device
from unweight.gpu.rows import take_rows
from unweight.gpu.scratch import unpack_on_device
from unweight.gpu.weight import DeviceTiles, to_device
from unweight.strips import Incompressible
from unweight.tiles import U12Tiles, pack_tiles

ANY = {"max_exception_share": 1.0, "max_size_share": 1e9}
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def matrices() -> dict[str, NDArray[np.uint16]]:
    random = np.random.default_rng(4)
    far = gaussian(70, 200)
    far[3] -= 40 << 7
    return {
        "one": np.array([[0x3F80]], np.uint16),
        "odd": hard(63, 100),
        "a chunk and a little": hard(65, 1030),
        "two blocks": hard(130, 300),
        "rows far apart": far,
        "zeros": np.zeros((64, 128), np.uint16),
        "minus zeros": np.full((64, 130), 0x8000, np.uint16),
        "infinite": np.full((2, 3), 0x7F80, np.uint16),
        "every pattern": PATTERNS.reshape(64, 1024),
        "patterns, shuffled": random.permutation(PATTERNS)[:4096].reshape(32, 128),
    }


@pytest.fixture(params=matrices(), ids=str)
def weights(request: pytest.FixtureRequest) -> NDArray[np.uint16]:
    return matrices()[request.param]


def packed(weights: NDArray[np.uint16]) -> DeviceTiles:
    return to_device(pack_tiles(weights, **ANY), DEVICE)


def assert_same(tiles: U12Tiles, expected: U12Tiles) -> None:
    for name in ("words", "base", "ptr", "exceptions"):
        np.testing.assert_array_equal(getattr(tiles, name), getattr(expected, name), name)
    assert tiles.first_base == expected.first_base


def test_packing_makes_the_same_arrays(weights: NDArray[np.uint16]) -> None:
    tiles = pack_on_device(as_tensor(weights), **ANY)
    assert_same(tiles.to_host(), pack_tiles(weights, **ANY))


def test_packing_from_planes_makes_the_same_arrays(weights: NDArray[np.uint16]) -> None:
    sm = (weights >> 8 & 0x80 | weights & 0x7F).astype(np.uint8)
    exponents = (weights >> 7).astype(np.uint8)
    planes = (torch.from_numpy(plane).to(DEVICE) for plane in (sm, exponents))
    assert_same(pack_planes_on_device(*planes, **ANY).to_host(), pack_tiles(weights, **ANY))


def test_decoding_gives_the_bits_back(weights: NDArray[np.uint16]) -> None:
    out = torch.full(weights.shape, 7.0, dtype=torch.bfloat16, device=DEVICE)
    assert unpack_on_device(packed(weights), out=out) is out
    np.testing.assert_array_equal(bits(out), weights)
    np.testing.assert_array_equal(bits(unpack_on_device(packed(weights))), weights)


def test_rows_are_those_of_the_matrix(weights: NDArray[np.uint16]) -> None:
    ids = np.random.default_rng(5).integers(0, len(weights), 9)
    found = take_rows(packed(weights), torch.from_numpy(ids).to(DEVICE))
    np.testing.assert_array_equal(bits(found), weights[ids])


def test_every_row_in_order_is_the_matrix() -> None:
    weights = hard(130, 300)
    ids = torch.arange(130, dtype=torch.int32, device=DEVICE)
    np.testing.assert_array_equal(bits(take_rows(packed(weights), ids)), weights)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="ids on a device are not looked at")
@pytest.mark.parametrize("ids", [[-1], [0, 63]])
def test_a_row_that_is_not_there_is_named(ids: list[int]) -> None:
    with pytest.raises(IndexError, match="of a matrix of 63"):
        take_rows(packed(hard(63, 100)), torch.tensor(ids))


def test_no_rows_are_none() -> None:
    no_ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert take_rows(packed(hard(63, 100)), no_ids).shape == (0, 100)


def test_what_does_not_pay_is_refused() -> None:
    with pytest.raises(Incompressible, match="exceptions in 64 x 1024"):
        pack_on_device(as_tensor(PATTERNS.reshape(64, 1024)))
    with pytest.raises(Incompressible, match="bytes for"):
        pack_on_device(as_tensor(gaussian(64, 64)))
