"""Case 20: a simulated region whose prompts begin alike, a few of the beginnings very often.

Time passes in tokens: a prefill worker computes one each tick, of a queue, first come first served.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from infire.prefix import Chain, root
from origin_gpu.handover import CacheNews
from origin_gpu.place import Candidate, Split, place
from origin_gpu.prefix_index import PrefixIndex
from routing.affinity import prefix_key
from tests.origin_gpu.test_place import DECODE, PREFILL, REQUEST

SIZE = 16
NUM_WORKERS = 4
PREFIX_BLOCKS, SUFFIX_TOKENS = 20, 24
MOST_BLOCKS = 15 * PREFIX_BLOCKS  # that a worker's cache has: of 15 of the 60 prefixes
START = root(b"", "d", None)


@dataclass
class Prefiller:
    """A worker with an LRU cache, busy until a certain tick."""

    name: str
    busy_until: float = 0.0
    computed: int = 0
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    number: int = 0

    def compute(self, ids: tuple[int, ...], now: float, index: PrefixIndex) -> int:
        """Take a prompt; how many of its tokens were cached."""
        keys = Chain(START, SIZE).keys(ids, (len(ids) - 1) // SIZE)
        hit = next((n for n, key in enumerate(keys) if key not in self.cache), len(keys))
        work = len(ids) - hit * SIZE
        self.computed += work
        self.busy_until = max(now, self.busy_until) + work
        for key in keys:
            self.cache[key] = None
            self.cache.move_to_end(key)
        gone = [self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - MOST_BLOCKS)]
        assert index.hear(self.name, CacheNews(self.number, tuple(keys), tuple(gone)))
        self.number += 1
        return hit * SIZE


@dataclass
class Region:
    """What came of all requests."""

    rng: random.Random
    aware: bool  # whether the front knows of caches
    workers: list[Prefiller] = field(
        default_factory=lambda: [Prefiller(f"p{n}") for n in range(NUM_WORKERS)]
    )
    index: PrefixIndex = field(default_factory=PrefixIndex)
    in_flight: list[tuple[float, str, int]] = field(default_factory=list)  # until, worker, tokens
    waited: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0

    def ask(self, ids: tuple[int, ...], now: float) -> None:
        while self.in_flight and self.in_flight[0][0] <= now:
            self.in_flight.pop(0)
        names = [it.name for it in self.workers]
        most = (len(ids) - 1) // SIZE
        found = self.index.num_found(names, Chain(START, SIZE), ids, most) if self.aware else {}
        ready = [self._candidate(name, SIZE * found.get(name, 0)) for name in names]
        affinity = prefix_key("account", ids) or b""
        request = msgspec.structs.replace(REQUEST, token_ids=ids, affinity=affinity)
        placed = place([*ready, DECODE], request)
        assert isinstance(placed, Split)
        expected = next(it.cached_tokens for it in ready if it.name == placed.prefill)
        worker = next(it for it in self.workers if it.name == placed.prefill)
        cached = worker.compute(ids, now, self.index)
        insort(self.in_flight, (worker.busy_until, worker.name, len(ids) - expected))
        self.waited.append(worker.busy_until - now)
        self.num_prompt += len(ids)
        self.num_cached += cached

    def _candidate(self, name: str, cached_tokens: int) -> Candidate:
        tokens = sum(count for _, whose, count in self.in_flight if whose == name)
        return replace(PREFILL, name=name, tokens_in_flight=tokens, cached_tokens=cached_tokens)


def simulate(seed: int, *, aware: bool) -> Region:
    rng = random.Random(seed)
    prefixes = [tuple(rng.randrange(1000) for _ in range(PREFIX_BLOCKS * SIZE)) for _ in range(60)]
    weights = [1 / (rank + 1) ** 1.2 for rank in range(len(prefixes))]  # Zipf
    region, now = Region(rng, aware), 0.0
    for _ in range(1500):
        now += rng.expovariate(1 / 30)  # a prompt of 344 tokens: 2.9 times what all could compute
        [prefix] = rng.choices(prefixes, weights)
        suffix = tuple(rng.randrange(1000) for _ in range(SUFFIX_TOKENS))
        region.ask(prefix + suffix, now)
    return region


@pytest.mark.parametrize("seed", range(3))
def test_a_hot_prefix_is_found_often_and_no_worker_drowns_in_it(seed: int) -> None:
    """Against a front that spreads the same requests without knowing of caches."""
    region = simulate(seed, aware=True)
    computed = [it.computed for it in region.workers]
    mean = sum(computed) / len(computed)
    assert max(computed) < 1.15 * mean
    assert region.num_cached > 0.7 * region.num_prompt
    blind = simulate(seed, aware=False)
    assert region.num_cached > 1.1 * blind.num_cached
    assert sum(region.waited) < 0.5 * sum(blind.waited)
