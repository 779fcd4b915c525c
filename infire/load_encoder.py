"""From a model folder to an encoder that is ready. Knows no request and no queue."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from infire.device import choose_device, choose_dtype
from infire.model.encoder import Encoder, encoder
from infire.model.encoder_config import read_encoder
from infire.notes import Pooling
from infire.weight_files import model_digest
from infire.weights import WeightFiles

_logger = logging.getLogger(__name__)

_WARM_UP = ((1,), (1,) * 24, (1,) * 100)  # tokens: one group of attention, and several


@dataclass(frozen=True, slots=True)
class VectorModel:
    """An `infire.embed.Model`."""

    encoder: Encoder

    @property
    def width(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def pooling(self) -> Pooling:
        return self.encoder.config.pooling

    @property
    def vocab_size(self) -> int:
        return self.encoder.config.vocab_size

    @property
    def context_window(self) -> int:
        return self.encoder.config.context_window

    def vectors(self, texts: Seq[Seq[int]], poolings: Seq[Pooling]) -> list[bytes]:
        found = self.encoder.vectors(texts, poolings).numpy()  # (N, width) float32
        if sys.byteorder == "big":
            found = found.byteswap()
        return [row.tobytes() for row in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEncoder:
    """A model in memory, warm."""

    model: VectorModel
    model_digest: str
    device: str
    dtype: str
    load_s: float


def load_encoder(folder: Path, *, device: str, dtype: str, threads: int) -> LoadedEncoder:
    """Read the weights of `folder` and make a few vectors with them.

    `threads` holds for the whole process. Raises `BadModel` for a folder that cannot be served,
    `NoDevice` for a device that does not work.
    """
    began = perf_counter()
    torch.set_num_threads(threads)
    config = read_encoder(folder)
    where, trouble = choose_device(device)
    if trouble is not None:
        _logger.warning("computing on the CPU: %s", trouble)
    # These models are small: what BF16 would save is not worth its rounding.
    kind = torch.float32 if dtype == "auto" else choose_dtype(dtype, where)
    weights = WeightFiles(folder, device=where, dtype=kind, threads=threads)
    model = VectorModel(encoder(config, weights))
    longest = model.context_window
    texts = [text[:longest] for text in _WARM_UP]
    model.vectors(texts, [model.pooling] * len(texts))
    return LoadedEncoder(
        model=model,
        model_digest=model_digest(folder),
        device=str(where),
        dtype=str(kind).removeprefix("torch."),
        load_s=perf_counter() - began,
    )
