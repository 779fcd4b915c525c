"""One forward pass of a decoder as a tape of kernels over memory that stays where it is.

Knows no plan: whoever fills in the step's arrays runs the tape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from ctypes import Structure
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infire.kernels.cpu.library import (
    AttentionArgs,
    EmbedArgs,
    HeadArgs,
    Kind,
    LinearArgs,
    Matrix,
    NormArgs,
    RopeArgs,
    SiluArgs,
    Step,
    Tables,
    Tape,
    address,
    aligned,
)
from infire.model.config import ModelConfig
from infire.model.rope import rope_frequencies
from infire.native.cache import Cache
from infire.native.resident import Resident
from infire.native.sampler import Sampler

_BF16: np.dtype[Any] = np.dtype(np.uint16)
SPAN = np.dtype([("first", "i8"), ("start", "i8"), ("length", "i8"), ("slot", "i8")])
_PAD = 32  # columns: rows begin at a multiple of 64 bytes, and vectors may reach past the last one


class StepArrays:
    """What changes from step to step; kernels read it at fixed addresses."""

    def __init__(self, *, max_tokens: int, num_slots: int) -> None:
        self.token_ids = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.sampled = np.zeros(max_tokens, np.int32)
        self.spans = np.zeros(num_slots, SPAN)
        self.record = Step(
            token_ids=address(self.token_ids),
            positions=address(self.positions),
            spans=address(self.spans),
            sampled=address(self.sampled),
        )

    def field(self, name: str) -> int:
        """The address of a number of the step."""
        place: int = getattr(Step, name).offset
        return ctypes.addressof(self.record) + place


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffer:
    """Rows of activations, and how wide they are with their padding."""

    rows: NDArray[np.uint16] | NDArray[np.float32]

    @property
    def at(self) -> int | None:
        return address(self.rows)

    @property
    def ld(self) -> int:
        return int(self.rows.shape[1])


class Program:
    """The tape of a model, and all memory that it points to."""

    def __init__(  # noqa: PLR0913  one parameter a part
        self,
        config: ModelConfig,
        weights: Resident,
        cache: Cache,
        tables: Seq[Tables],
        step: StepArrays,
        sampler: Sampler,
        *,
        max_tokens: int,
        inputs: np.dtype[Any],
    ) -> None:
        """`inputs`: what the kernels want products to read."""
        self._config, self._weights, self._cache = config, weights, cache
        self._tables, self._step, self._sampler = tables, step, sampler
        self._cos, self._sin = _rotations(config, max_tokens)
        rows = len(step.token_ids)
        heads = config.num_heads + 2 * config.num_kv_heads
        self._x = _buffer(rows, config.hidden_size)
        self._normed = _buffer(rows, config.hidden_size, inputs)
        self._delta = _buffer(rows, config.hidden_size)
        self._qkv = _buffer(rows, heads * config.head_dim)
        self._mixed = _buffer(rows, config.num_heads * config.head_dim, inputs)
        self._gate_up = _buffer(rows, 2 * config.intermediate_size)
        self._inner = _buffer(rows, config.intermediate_size, inputs)
        forward = list(self._forward())
        #: without the head: for steps in which nothing is sampled
        self.forward = Tape(forward)
        self.sampling = Tape([*forward, *self._choose()])

    def _forward(self) -> Iterator[tuple[Kind, Structure]]:
        yield (
            Kind.EMBED,
            EmbedArgs(
                step=address(self._step.record),
                table=address(self._matrix("embeddings")),
                out=self._x.at,
                ld_out=self._x.ld,
            ),
        )
        delta: _Buffer | None = None
        for n in range(self._config.num_layers):
            yield from self._attention(n, delta)
            yield from self._mlp(n)
            delta = self._delta

    def _attention(self, n: int, delta: _Buffer | None) -> Iterator[tuple[Kind, Structure]]:
        config = self._config
        group, k, v = self._cache.layers[n]
        about = {
            "step": address(self._step.record),
            "tables": address(self._tables[group]),
            "qkv": self._qkv.at,
            "ld_qkv": self._qkv.ld,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "k": address(k),
            "v": address(v),
        }
        yield self._norm(f"{n}.attention_norm", delta)
        yield self._linear(f"{n}.qkv", self._normed, self._qkv)
        yield (
            Kind.ROPE,
            RopeArgs(
                q_norm=address(self._weights.vector(f"{n}.q_norm")),
                k_norm=address(self._weights.vector(f"{n}.k_norm")),
                eps=config.norm_eps,
                cos=address(self._cos),
                sin=address(self._sin),
                **about,
            ),
        )
        yield (
            Kind.ATTENTION,
            AttentionArgs(
                scale=config.head_dim**-0.5, out=self._mixed.at, ld_out=self._mixed.ld, **about
            ),
        )
        yield self._linear(f"{n}.out", self._mixed, self._delta)

    def _mlp(self, n: int) -> Iterator[tuple[Kind, Structure]]:
        yield self._norm(f"{n}.mlp_norm", self._delta)
        yield self._linear(f"{n}.gate_up", self._normed, self._gate_up)
        yield (
            Kind.SILU,
            SiluArgs(
                num_rows=self._step.field("num_tokens"),
                x=self._gate_up.at,
                ld_x=self._gate_up.ld,
                size=self._config.intermediate_size,
                out=self._inner.at,
                ld_out=self._inner.ld,
            ),
        )
        yield self._linear(f"{n}.down", self._inner, self._delta)

    def _choose(self) -> Iterator[tuple[Kind, Structure]]:
        sampled, args = self._step.field("num_sampled"), self._sampler.args
        yield self._norm(
            "norm", self._delta, rows=sampled, index=address(self._step.sampled), keep=False
        )
        name = "embeddings" if self._config.tied_embeddings else "head"
        yield (
            Kind.HEAD,
            HeadArgs(
                num_rows=sampled,
                weight=address(self._matrix(name)),
                x=self._normed.at,
                ld_x=self._normed.ld,
                vocabulary=self._config.vocab_size,
                limits=address(self._sampler.limits),
                logits=args.logits,
                candidates=args.candidates,
            ),
        )
        yield Kind.SAMPLE, args

    def _norm(
        self,
        name: str,
        delta: _Buffer | None,
        *,
        rows: int | None = None,
        index: int | None = None,
        keep: bool = True,
    ) -> tuple[Kind, Structure]:
        """`delta` is added to x first."""
        return Kind.NORM, NormArgs(
            num_rows=rows or self._step.field("num_tokens"),
            index=index,
            x=self._x.at,
            delta=delta.at if delta else None,
            ld_x=self._x.ld,
            weight=address(self._weights.vector(name)),
            eps=self._config.norm_eps,
            size=self._config.hidden_size,
            out=self._normed.at,
            ld_out=self._normed.ld,
            keep=keep,
        )

    def _linear(self, name: str, x: _Buffer, y: _Buffer) -> tuple[Kind, Structure]:
        return Kind.LINEAR, LinearArgs(
            num_rows=self._step.field("num_tokens"),
            weight=address(self._matrix(name)),
            bias=address(self._weights.vector(f"{name}_bias")),
            x=x.at,
            ld_x=x.ld,
            y=y.at,
            ld_y=y.ld,
        )

    def _matrix(self, name: str) -> Matrix:
        return self._weights.matrix(name)


def _buffer(rows: int, width: int, dtype: np.dtype[Any] = _BF16) -> _Buffer:
    return _Buffer(rows=aligned(rows, -(-width // _PAD) * _PAD, dtype=dtype))


def _rotations(
    config: ModelConfig, max_tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines (max_tokens, head_dim / 2) of the angles at each position."""
    frequencies = np.array(rope_frequencies(config.rope, config.head_dim), np.float32)
    angles = np.outer(np.arange(max_tokens, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)
