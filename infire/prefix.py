"""What names the content of a KV block: a hash over its tokens and all that came before them. Pure.

The chain begins with what else decides KV: the tenant, the model, the adapter. So two tenants'
names are disjoint, and equal names mean equal KV, in whatever worker it was computed. Chained
hashes of blocks are vLLM's design (https://docs.vllm.ai/en/latest/design/prefix_caching.html).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b

KEY_BYTES = 16


def root(cache_salt: bytes, model_digest: str, adapter: str | None) -> bytes:
    """Where the chains of one tenant, model and adapter begin."""
    digest = blake2b(digest_size=KEY_BYTES, person=b"edgefire prefix")
    for part in (cache_salt, model_digest.encode(), (adapter or "").encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class Chain:
    """The keys of one sequence's full blocks, each computed once, as the sequence grows."""

    def __init__(self, start: bytes, block_tokens: int) -> None:
        self._keys = [start]
        self._block_tokens = block_tokens

    def keys(self, token_ids: Seq[int], count: int) -> list[bytes]:
        """Keys of the first `count` blocks of `token_ids`, which may only ever grow."""
        keys, size = self._keys, self._block_tokens
        while len(keys) <= count:
            end = len(keys) * size
            assert end <= len(token_ids), "a key is of a full block"
            ids = array("i", token_ids[end - size : end])
            keys.append(blake2b(keys[-1] + ids.tobytes(), digest_size=KEY_BYTES).digest())
        return keys[1 : count + 1]


def chain_keys(start: bytes, token_ids: Seq[int], block_tokens: int) -> list[bytes]:
    """Keys of all full blocks of `token_ids`."""
    return Chain(start, block_tokens).keys(token_ids, len(token_ids) // block_tokens)
