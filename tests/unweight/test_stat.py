"""Figures that a person can work out, and pictures of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.unweight.bundles import MATRIX, bf16, bundle, file_of
from unweight.histogram import bars, draw, window
from unweight.rounding import to_bf16
from unweight.samples import LAYERS, trained_like
from unweight.stat import entropy, measure, of_files
from unweight.strips import u12_bytes
from unweight.tiles import tiles_bytes


def test_entropy_of_counts_by_hand() -> None:
    def of(*counts: int) -> float:
        return entropy(np.array(counts))

    assert of(5) == 0
    assert of(4, 4) == 1
    assert of(2, 0, 1, 1) == 1.5
    assert of(*[3] * 256) == 8


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80), (-0.0, 0x8000), (1e-40, 0x0001), (float("inf"), 0x7F80),
        (-float("inf"), 0xFF80), (3.4e38, 0x7F80), (1 + 2**-9, 0x3F80), (1 + 3 * 2**-9, 0x3F81),
        (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82), (1 + 2**-8 + 2**-20, 0x3F81),
    ],
)  # fmt: skip
def test_rounding_is_to_nearest_ties_to_even(value: float, bits: int) -> None:
    assert to_bf16(np.array([value], np.float32)).tolist() == [bits]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_rounding_leaves_nan_what_it_is(bits: int) -> None:
    (found,) = to_bf16(np.array([bits], np.uint32).view(np.float32)).tolist()
    assert found & 0x7F80 == 0x7F80
    assert found & 0x7F
    assert found >> 15 == bits >> 31


def matrix() -> np.ndarray:
    """(64, 512) of two exponents, half of each, and one weight that fits no window."""
    weights = np.full((64, 512), 0x3F80, np.uint16)
    weights[:, ::2] = 0x4000
    weights[3, 5] = 0x0001
    return weights


def test_a_matrix_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        file_of({"m.weight": bf16(matrix()), "b": bf16(matrix()[0, :7]), "n": ("I8", (3,), b"123")})
    )
    found = measure("x", of_files([path], as_bf16=False), threads=1)
    m, b, n = found.tensors
    assert (m.dtype, m.shape, m.linear, b.linear, n.linear) == (
        "BF16",
        (64, 512),
        True,
        False,
        False,
    )
    assert m.entropy == pytest.approx(1, abs=0.001)
    assert m.tile_bits == 8 * tiles_bytes(64, 512, 1, nibbles=True) / m.num_weights
    assert m.strip_bits == 8 * u12_bytes(64, 512, 1).total / m.num_weights
    assert m.exceptions == 1 / (64 * 512)
    assert (m.why_raw, b.why_raw, n.why_raw) == (None, "no matrix", "I8, not BF16")
    assert (b.bundle_bits, n.bundle_bits) == (16, 8)
    assert 8 < m.bundle_bits < 8.6  # signs and mantissas are kept; exponents are regular
    assert found.exponents[127] == 64 * 256 - 1 + 3
    assert found.exponents[128] == 64 * 256 + 4
    assert found.exponents[0] == 1
    assert sum(found.exponents) == 64 * 512 + 7
    assert found.linear is not None
    assert found.linear.num_weights == 64 * 512
    assert found.everything.num_weights == 64 * 512 + 10
    assert found.everything.source_bits == pytest.approx((64 * 512 * 16 + 7 * 16 + 3 * 8) / 32778)


def test_float32_is_raw_or_rounded_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights = np.random.default_rng(0).standard_normal((128, 512)).astype("<f4")
    path.write_bytes(file_of({"w": ("F32", weights.shape, weights.tobytes())}))
    (raw,) = measure("x", of_files([path], as_bf16=False), threads=1).tensors
    assert (raw.dtype, raw.bundle_bits, raw.why_raw) == ("F32", 32, "F32, not BF16")
    found = measure("x", of_files([path], as_bf16=True), threads=1, rounded=True)
    assert found.rounded
    assert found.tensors[0].dtype == "BF16"
    assert found.linear is not None
    assert found.linear.tile_bits / 16 < 0.751
    assert found.linear.bundle_bits / 16 < 0.675


def test_a_bundle_has_the_figures_of_its_source(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    plain = path.with_name("plain.safetensors")
    one, other = (
        measure("x", of_files([p], as_bf16=False), threads=2).tensors for p in (path, plain)
    )
    assert [t.name for t in one] == [t.name for t in other]
    assert one == other
    assert next(t for t in one if t.name == MATRIX).bundle_bits < 10.8


def test_incompressible_matrices_say_why(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    noise = np.random.default_rng(0).integers(0, 1 << 16, (64, 512)).astype(np.uint16)
    path.write_bytes(file_of({"noise": bf16(noise)}))
    found = measure("x", of_files([path], as_bf16=False), threads=1)
    (tensor,) = found.tensors
    assert tensor.linear
    assert tensor.tile_bits is None
    assert "exceptions" in (tensor.why_raw or "")
    assert tensor.bundle_bits == 16
    assert found.linear is not None
    assert found.linear.tile_bits == 16


def test_samples_are_spread_as_they_say() -> None:
    bits = trained_like(512, 2048, seed=3)
    assert np.array_equal(bits, trained_like(512, 2048, seed=3))
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    scales = values.std(axis=1)
    assert math.exp(np.log(scales).mean()) == pytest.approx(0.02, rel=0.1)
    assert np.log(scales).std() == pytest.approx(0.35, rel=0.15)
    assert sum(n * k for n, k in LAYERS["llama-3.1-8b-layer"].values()) == 218_103_808


def counts(**of: int) -> list[int]:
    found = [0] * 256
    for name, count in of.items():
        found[int(name[1:])] = count
    return found


def test_the_window_has_most_weights() -> None:
    assert window(counts(e100=5, e114=5, e115=4)) == range(100, 115)
    assert window(counts(e0=99, e255=99, e254=1)) == range(240, 255)  # neither 0 nor 255


def test_bars_by_hand() -> None:
    lines = bars(counts(e126=20_000, e127=10_000, e0=1, e255=500), width=40)
    assert lines == [
        "    2^-1 │ " + "█" * 16 + " 65.572%",
        "     2^0 │ " + "█" * 8 + " " * 8 + " 32.786%",
        " Inf NaN   " + "▍" + " " * 15 + "  1.639%",
        "1 more exponents, together 0.00%",
        "│ the 15 exponents that most weights have: 98.357%",
    ]


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    draw(counts(e126=20, e127=10, e0=1), "some", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(OSError, match="nowhere"):
        draw(counts(e126=20), "some", tmp_path / "nowhere" / "x.png")
