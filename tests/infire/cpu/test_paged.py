"""Rotation, KV written and attention read through block tables, against torch, for each build."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from infire.kernels.cpu.library import AttentionArgs, Kind, RopeArgs, Step, Tables, Tape, address
from infire.kernels.cpu.rope import rope_reference
from infire.kernels.paged_attention import paged_attention_reference
from infire.kernels.tiles import Span
from infire.kv_layout import KVGroup
from infire.native.program import SPAN
from tests.infire.cpu.kernels import MARCHES, bits, library, no_inputs, rows, tensor

Rows = list[tuple[int, int]]  # (position of the first new token, how many)
MIXED: Rows = [(40, 1), (0, 33), (7, 1), (129, 128), (500, 1), (16, 1), (3, 2), (260, 7)]


class Case:
    """Spans over random KV in blocks that are strewn over the cache; the rest of it is garbage."""

    def __init__(
        self,
        spans: Rows,
        *,
        heads: int = 6,
        kv_heads: int = 2,
        size: int = 16,
        window: int | None = None,
        chunked: bool = False,
        block_tokens: int = 16,
    ) -> None:
        torch.manual_seed(3)
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        kind = "full" if window is None else "chunked" if chunked else "sliding"
        self.group = KVGroup(
            kind=kind,
            layers=(0,),
            num_heads=kv_heads,
            head_dim=size,
            window=window,
            block_tokens=block_tokens,
        )
        counts = [-(-(start + new) // block_tokens) for start, new in spans]
        ids = list(range(sum(counts) + 3))
        random.Random(5).shuffle(ids)
        self.blocks = np.zeros((len(spans), max(counts)), np.int32)
        for n, count in enumerate(counts):
            self.blocks[n, :count], ids = ids[:count], ids[count:]
        self.spans = spans
        width = (heads + 2 * kv_heads) * size
        self.qkv = torch.randn(sum(new for _, new in spans), width).bfloat16()
        cells = (sum(counts) + 3, block_tokens, kv_heads, size)
        self.k, self.v = (torch.randn(cells) * 2).bfloat16(), torch.randn(cells).bfloat16()

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Span and position of each token."""
        for n, (start, new) in enumerate(self.spans):
            yield from ((n, position) for position in range(start, start + new))

    def step(self) -> tuple[Step, Tables, list[NDArray[np.generic]]]:
        """And the arrays to be kept alive."""
        spans = np.zeros(len(self.spans), SPAN)
        first = 0
        for n, (start, new) in enumerate(self.spans):
            spans[n] = (first, start, new, n)
            first += new
        positions = np.array([position for _, position in self.tokens()], np.int32)
        step = Step(
            num_tokens=first,
            num_spans=len(spans),
            positions=address(positions),
            spans=address(spans),
        )
        tables = Tables(
            blocks=address(self.blocks),
            width=self.blocks.shape[1],
            block_tokens=self.group.block_tokens,
            window=self.group.window or 0,
            chunked=self.group.kind == "chunked",
        )
        return step, tables, [spans, positions]

    def attend(self, march: str, threads: int = 2) -> Tensor:
        step, tables, alive = self.step()
        qkv, k, v = rows(self.qkv), bits(self.k).copy(), bits(self.v).copy()
        out = no_inputs(march, len(qkv), self.heads * self.size)
        args = AttentionArgs(
            step=address(step),
            tables=address(tables),
            qkv=address(qkv),
            ld_qkv=qkv.shape[1],
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            k=address(k),
            v=address(v),
            scale=0.25,
            out=address(out),
            ld_out=out.shape[1],
        )
        library(march, max(threads, 2)).run(Tape([(Kind.ATTENTION, args)]), num_threads=threads)
        assert alive
        return tensor(out, self.heads * self.size)

    def reference(self) -> Tensor:
        q = self.qkv[:, : self.heads * self.size].view(-1, self.heads, self.size)
        spans, first = [], 0
        for n, (start, new) in enumerate(self.spans):
            seen = [self.group.first_visible(p) for p in range(start, start + new)]
            spans.append(
                Span(first=first, start=start, blocks=self.blocks[n], oldest=np.array(seen))
            )
            first += new
        return paged_attention_reference(q, self.k, self.v, spans, 0.25).flatten(1)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("size", [16, 24, 64, 128])
def test_attention(size: int, heads: int, kv_heads: int, march: str) -> None:
    case = Case(MIXED, heads=heads, kv_heads=kv_heads, size=size)
    found, expected = case.attend(march).float(), case.reference().float()
    assert (found - expected).abs().max().item() <= 2e-2


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("block_tokens", [1, 3, 16, 64])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [1, 20, 64, 200])
def test_windows(window: int, chunked: bool, block_tokens: int, march: str) -> None:
    case = Case(MIXED, window=window, chunked=chunked, block_tokens=block_tokens)
    found, expected = case.attend(march).float(), case.reference().float()
    assert (found - expected).abs().max().item() <= 2e-2


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("window", [None, 50])
def test_a_tokens_attention_is_the_same_in_any_step(window: int | None, march: str) -> None:
    """Of a prompt of 300 tokens: whole, in chunks, and its last tokens by themselves."""
    whole = Case([(0, 300)], window=window)
    expected = bits(whole.attend(march))
    assert np.array_equal(bits(whole.attend(march, threads=1)), expected)
    for start, new in ((0, 7), (7, 133), (140, 160), (299, 1), (128, 1), (255, 3)):
        part = Case([(0, 300)], window=window)
        part.spans, part.qkv = [(start, new)], whole.qkv[start : start + new]
        assert np.array_equal(bits(part.attend(march)), expected[start : start + new])


@pytest.mark.parametrize("threads", [128, 256, 300])
def test_any_number_of_threads_computes_the_same(threads: int) -> None:
    """As many as large machines have cores, over more items than are split up for a few."""
    case = Case([(200, 1)] * 300, heads=1, kv_heads=1)
    expected = bits(case.attend("native"))
    for _ in range(3):
        assert np.array_equal(bits(case.attend("native", threads=threads)), expected)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("size", [16, 64, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_writing(size: int, normed: bool, march: str) -> None:
    case = Case(MIXED, size=size)
    heads, kv_heads = case.heads, case.kv_heads
    angles = torch.outer(torch.arange(600.0), 1e4 ** -(torch.arange(size // 2) * 2 / size))
    cos, sin = angles.cos(), angles.sin()
    weights = [torch.rand(size).bfloat16() + 0.5 for _ in "qk"]
    cosines, sines = cos.numpy().copy(), sin.numpy().copy()
    scales = [bits(weight).copy() for weight in weights]
    step, tables, alive = case.step()
    qkv, k, v = rows(case.qkv), bits(case.k).copy(), bits(case.v).copy()
    args = RopeArgs(
        step=address(step),
        tables=address(tables),
        qkv=address(qkv),
        ld_qkv=qkv.shape[1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        q_norm=address(scales[0]) if normed else None,
        k_norm=address(scales[1]) if normed else None,
        eps=1e-6,
        cos=address(cosines),
        sin=address(sines),
        k=address(k),
        v=address(v),
    )
    library(march).run(Tape([(Kind.ROPE, args)]))
    assert alive
    values = case.qkv.view(len(case.qkv), -1, size)
    q, new_k, new_v = values.split([heads, kv_heads, kv_heads], 1)

    at = torch.tensor([position for _, position in case.tokens()])
    q_weight, k_weight = weights if normed else (None, None)
    turned_q = rope_reference(q, cos[at], sin[at], q_weight, 1e-6)
    turned_k = rope_reference(new_k, cos[at], sin[at], k_weight, 1e-6).bfloat16()
    found = tensor(qkv, values.shape[1] * size).view(values.shape)[:, :heads]
    expected_k, expected_v = case.k.clone(), case.v.clone()
    torch.testing.assert_close(found.double(), turned_q, rtol=2**-8, atol=1e-3)
    for n, (span, position) in enumerate(case.tokens()):
        block, offset = divmod(position, case.group.block_tokens)
        cell = (case.blocks[span, block], offset)
        expected_k[cell], expected_v[cell] = turned_k[n], new_v[n]
    written = torch.from_numpy(k.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(written, expected_k, rtol=2**-7, atol=1e-3)
    assert np.array_equal(v, bits(expected_v))
