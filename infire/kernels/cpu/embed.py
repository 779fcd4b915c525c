"""The torch reference of `embed.cpp`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding


def embed_reference(token_ids: Tensor, table: Tensor) -> Tensor:
    """(T, hidden): the rows of `table`, (V, hidden), at token_ids (T,)."""
    return embedding(token_ids, table)
