"""Where the KV of a position lies in its group's cache. Indices only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infire.kv_layout import KVGroup


def cells_of(
    group: KVGroup, table: NDArray[np.integer], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where the KV of `positions` lies in the group: block * P + offset, (T,)."""
    blocks, offsets = np.divmod(positions, group.block_tokens)
    return table[blocks].astype(np.int64) * group.block_tokens + offsets
