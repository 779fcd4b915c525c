"""KV of one number of ranks becomes KV of another: every value says where it belongs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from infire.kv_cache import KVCache
from infire.kv_layout import DTYPE_BYTES, GroupKind, KVGroup, KVLayout
from infire.reshard import as_it_is, plan
from infire.reshard_files import reshard, reshard_files

SIZES = (1, 2, 4, 8)


def exported(layout: KVLayout, num_tokens: int, rank: int) -> bytes:
    """What a rank exports, were a value what it says of its layer, plane, token, head and place.

    In 2 bytes, only what is left of that modulo a prime: neighbours still differ.
    """
    content = b""
    for group in layout.groups:
        first = group.first_visible(num_tokens)
        axes = np.ix_(
            np.array(group.layers),
            np.arange(group.planes),
            np.arange(first, num_tokens),
            np.array(layout.heads(group, rank)),
            np.arange(group.head_dim),
        )
        layer, plane, token, head, place = (axis.astype(np.int64) for axis in axes)
        values = (((layer * 2 + plane) * 1000 + token) * 100 + head) * 100 + place
        size = DTYPE_BYTES[layout.dtype]
        content += (values % (65521 if size == 2 else 1 << 32)).astype(f"u{size}").tobytes()
    assert len(content) == layout.exported_bytes(num_tokens)
    return content


def resharded(
    source: KVLayout, target: KVLayout, num_tokens: int, exports: dict[int, bytes]
) -> bytes:
    """KV of the target's rank. What nobody writes stays at 0xEE."""
    into = bytearray(b"\xee" * target.exported_bytes(num_tokens))
    strips = plan(source, target, num_tokens, tuple(exports))
    assert sum(strip.width * strip.num_rows for strip in strips) == len(into)  # once
    reshard(strips, exports, memoryview(into))
    return bytes(into)


def all_exports(layout: KVLayout, num_tokens: int) -> dict[int, bytes]:
    return {rank: exported(layout, num_tokens, rank) for rank in layout.parts}


def test_by_hand() -> None:
    """Two heads of size 1, one layer, three tokens: K is 10 and 20 + the token, V 30 and 40."""
    group = KVGroup(kind="full", layers=(0,), num_heads=2, head_dim=1)
    one = KVLayout(groups=(group,), dtype="float32", model_digest="m")
    both = np.array([10, 20, 11, 21, 12, 22, 30, 40, 31, 41, 32, 42], np.uint32).tobytes()
    first = np.array([10, 11, 12, 30, 31, 32], np.uint32).tobytes()
    second = np.array([20, 21, 22, 40, 41, 42], np.uint32).tobytes()
    two = [one.cut(2, rank) for rank in range(2)]
    assert resharded(one, two[0], 3, {0: both}) == first
    assert resharded(one, two[1], 3, {0: both}) == second
    assert resharded(two[0], one, 3, {0: first, 1: second}) == both
    assert resharded(two[0], one, 3, {1: second, 0: first}) == both
    four = one.cut(4, 3)  # ranks 2 and 3 have the second head
    assert resharded(one, four, 3, {0: both}) == second
    assert resharded(four, one, 3, {0: first, 2: second}) == both
    assert resharded(four, one, 3, {1: first, 3: second}) == both


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("b", SIZES)
@pytest.mark.parametrize("num_tokens", [1, 9, 10, 63, 100])
def test_from_any_number_of_ranks_to_any_other_and_back(a: int, b: int, num_tokens: int) -> None:
    """All kinds of groups, with fewer heads than ranks in one of them."""
    whole = KVLayout(
        groups=(
            KVGroup(kind="full", layers=(0, 4), num_heads=8, head_dim=3),
            KVGroup(kind="sliding", layers=(1,), num_heads=2, head_dim=5, window=10),
            KVGroup(kind="chunked", layers=(2, 3), num_heads=4, head_dim=2, window=9),
            KVGroup(kind="latent", layers=(5,), num_heads=1, head_dim=7),
        ),
        dtype="bfloat16",
        model_digest="m",
    )
    there_and_back(whole, a, b, num_tokens)


def test_random_layouts() -> None:
    draw = random.Random(11)
    for _ in range(300):
        whole = KVLayout(
            groups=tuple(some_group(draw, n) for n in range(draw.randint(1, 3))),
            dtype=draw.choice(list(DTYPE_BYTES)),
            model_digest="m",
        )
        there_and_back(whole, draw.choice(SIZES), draw.choice(SIZES), draw.randint(1, 70))


def some_group(draw: random.Random, n: int) -> KVGroup:
    kind: GroupKind = draw.choice(get_args(GroupKind))
    return KVGroup(
        kind=kind,
        layers=tuple(range(n, n + 3 * draw.randint(1, 4), 3)),
        num_heads=1 if kind == "latent" else draw.choice([1, 2, 4, 8, 16]),
        head_dim=draw.choice([1, 3, 8, 17]),
        window=None if kind in {"full", "latent"} else draw.randint(1, 80),
        block_tokens=draw.choice([1, 7, 16]),
    )


def there_and_back(whole: KVLayout, a: int, b: int, num_tokens: int) -> None:
    source, target = whole.cut(a, 0), whole.cut(b, 0)
    came = {
        rank: resharded(source, whole.cut(b, rank), num_tokens, all_exports(source, num_tokens))
        for rank in range(b)
    }
    assert came == {rank: exported(target, num_tokens, rank) for rank in range(b)}
    parts = {rank: came[rank] for rank in target.parts}
    for rank in range(a):
        ours = whole.cut(a, rank)
        back = resharded(target, ours, num_tokens, parts)
        assert back == exported(ours, num_tokens, rank)
        [*alone] = [part for part in source.parts if as_it_is(source, ours, [part])]
        assert all(exported(source, num_tokens, part) == back for part in alone)
        assert bool(alone) or len(source.parts) > 1


def test_what_is_not_there_is_missed() -> None:
    group = KVGroup(kind="full", layers=(0,), num_heads=4, head_dim=1)
    whole = KVLayout(groups=(group,), dtype="float32", model_digest="m")
    two = whole.cut(2, 0)
    with pytest.raises(ValueError, match=r"heads 0 to 3 of full layers are not all on ranks \[1\]"):
        plan(two, whole, 5, [1])
    assert plan(two, whole.cut(4, 3), 5, [1])  # which needs no more
    with pytest.raises(ValueError, match="model digest m"):
        plan(two, replace(whole, model_digest="n"), 5)
    strips = plan(two, whole, 5)
    kv = all_exports(two, 5)
    with pytest.raises(ValueError, match="KV of rank 1 has 79 bytes, not 80"):
        reshard(strips, kv | {1: kv[1][:-1]}, memoryview(bytearray(160)))


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_the_caches_of_two_ranks_become_that_of_one(tmp_path: Path, num_tokens: int) -> None:
    """Real caches, real files, and blocks of two sizes."""
    sizes = {"num_heads": 4, "head_dim": 8, "block_tokens": 4}
    whole = KVLayout(
        groups=(
            KVGroup(kind="full", layers=(0, 2), **sizes),
            KVGroup(kind="sliding", layers=(1,), window=10, **sizes),
        ),
        dtype="bfloat16",
        model_digest="m",
    )
    paths = {rank: tmp_path / f"{rank}.kv" for rank in range(2)}
    blocks = [list(range(10))] * 2
    for rank, path in paths.items():
        (tmp_path / "made").write_bytes(exported(whole.cut(2, rank), num_tokens, rank))
        ours = KVCache(whole.cut(2, rank), [10, 10], torch.device("cpu"))
        ours.adopt(blocks, num_tokens, str(tmp_path / "made"))
        ours.export(blocks, num_tokens, str(path))
    into = tmp_path / "in.kv"
    strips = plan(whole.cut(2, 0), whole, num_tokens)
    reshard_files(strips, paths, into, whole.exported_bytes(num_tokens))
    assert into.read_bytes() == exported(whole, num_tokens, 0)
    coarse = replace(whole, groups=tuple(replace(g, block_tokens=7) for g in whole.groups))
    theirs = KVCache(coarse, [10, 10], torch.device("cpu"))
    theirs.adopt(blocks, num_tokens, str(into))
    theirs.export(blocks, num_tokens, str(tmp_path / "out.kv"))
    assert (tmp_path / "out.kv").read_bytes() == into.read_bytes()


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    group = KVGroup(kind="full", layers=(0,), num_heads=2, head_dim=1)
    whole = KVLayout(groups=(group,), dtype="float32", model_digest="m")
    strips = plan(whole.cut(2, 0), whole, 5)
    paths = {rank: tmp_path / f"{rank}.kv" for rank in range(2)}
    into = tmp_path / "in.kv"
    paths[0].write_bytes(exported(whole.cut(2, 0), 5, 0))
    with pytest.raises(FileNotFoundError):
        reshard_files(strips, paths, into, 80)
    assert not into.exists()
    paths[1].write_bytes(b"short")
    with pytest.raises(ValueError, match="KV of rank 1 has 5 bytes"):
        reshard_files(strips, paths, into, 80)
    assert not into.exists()
    into.write_text("mine")
    with pytest.raises(FileExistsError):
        reshard_files(strips, paths, into, 80)
    assert into.read_text() == "mine"


def test_kv_that_nobody_looks_at_is_an_empty_file(tmp_path: Path) -> None:
    """A chunk has just ended."""
    group = KVGroup(kind="chunked", layers=(0,), num_heads=2, head_dim=1, window=8)
    whole = KVLayout(groups=(group,), dtype="float32", model_digest="m")
    paths = {rank: tmp_path / f"{rank}.kv" for rank in range(2)}
    for path in paths.values():
        path.write_bytes(b"")
    strips = plan(whole.cut(2, 0), whole, 16)
    reshard_files(strips, paths, tmp_path / "in.kv", whole.exported_bytes(16))
    assert (tmp_path / "in.kv").read_bytes() == b""
