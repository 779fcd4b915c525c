"""A matrix asleep: in host memory, its exponents entropy coded, until the device wants it again.

For layers that are offloaded and models that sleep: two thirds of the bytes of BF16 to keep. It
comes straight out of a bundle's file, too. Knows the coder and the tiles, not who sleeps or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from unweight import coder
from unweight.bundle import BadChecksum, chunk_rows
from unweight.gpu.pack import pack_planes_on_device
from unweight.gpu.scratch import unpack_on_device
from unweight.gpu.weight import DeviceTiles
from unweight.reader import Shard

Planes = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # bytes of a chunk, frame of its exponents


class Resting:
    """(N, K) BF16 in chunks of whole rows, each a plane of bytes and a frame."""

    def __init__(
        self,
        chunks: Sequence[Planes],
        shape: tuple[int, int],
        *,
        device: torch.device,
        threads: int,
    ) -> None:
        self._chunks = chunks
        self._shape = shape
        self._device = device
        self._threads = threads

    @staticmethod
    def of(tiles: DeviceTiles, *, threads: int = 1) -> Resting:
        """What is on a device, coded."""
        shape = tiles.num_outputs, tiles.num_inputs
        words = unpack_on_device(tiles).view(torch.int16).cpu().numpy().view(np.uint16).reshape(-1)
        step = chunk_rows(shape) * shape[1]

        def code(start: int) -> Planes:
            sm, exponents = coder.split(words[start : start + step])
            return sm, np.frombuffer(coder.encode(exponents), np.uint8)

        with ThreadPoolExecutor(threads) as pool:
            chunks = list(pool.map(code, range(0, words.size, step)))
        return Resting(chunks, shape, device=tiles.words.device, threads=threads)

    @staticmethod
    def from_shard(shard: Shard, name: str, *, device: torch.device, threads: int = 1) -> Resting:
        """A compressed tensor of a bundle, as it lies in the mapped file."""
        entry = shard.entry(name)
        chunks = [shard.planes(name, chunk) for chunk in range(entry.num_chunks)]
        return Resting(chunks, entry.rows, device=device, threads=threads)

    @property
    def num_bytes(self) -> int:
        """In host memory, or of the file."""
        return sum(sm.nbytes + frame.nbytes for sm, frame in self._chunks)

    def wake(self) -> DeviceTiles:
        """Tiles on the device. Raises `BadChecksum` for a frame that is damaged, `Incompressible`.

        Only bytes and exponents cross the bus, and the matrix is never in BF16.
        """
        on_cuda = self._device.type == "cuda"
        planes = torch.empty((2, *self._shape), dtype=torch.uint8, pin_memory=on_cuda)
        sm, exponents = planes.numpy().reshape(2, -1)
        starts = np.cumsum([0, *(plane.size for plane, _ in self._chunks)])

        def decode(chunk: int) -> None:
            plane, frame = self._chunks[chunk]
            own = slice(starts[chunk], starts[chunk + 1])
            sm[own] = plane
            try:
                exponents[own] = coder.decode(frame, plane.size)
            except coder.BadFrame as error:
                raise BadChecksum(f"chunk {chunk} of a matrix at rest: {error}") from error

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(decode, range(len(self._chunks))):
                pass
        there = planes.to(self._device, non_blocking=True)
        return pack_planes_on_device(there[0], there[1], max_exception_share=1, max_size_share=1e9)
