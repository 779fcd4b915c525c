"""When engines can use each other's KV, and how its heads are shared out to ranks."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from infire.kv_layout import PLAIN, KVGroup, KVLayout, WeightCodec, difference

FULL = KVGroup(kind="full", layers=(0, 2), num_heads=8, head_dim=4)
SLIDING = KVGroup(kind="sliding", layers=(1, 3), num_heads=8, head_dim=4, window=10)
LATENT = KVGroup(kind="latent", layers=(0, 1), num_heads=1, head_dim=6)
LAYOUT = KVLayout(
    groups=(FULL, SLIDING),
    dtype="bfloat16",
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    codec=WeightCodec("bf16"),
)
U12 = WeightCodec("u12")
FP8 = WeightCodec("fp8", exact=False)


def group(**other: Any) -> KVLayout:
    return replace(LAYOUT, groups=(replace(FULL, **other), SLIDING))


@pytest.mark.parametrize(
    "other",
    [
        group(block_tokens=7),
        replace(LAYOUT, codec=U12),
        replace(LAYOUT, codec=PLAIN),
        *(LAYOUT.cut(size, size - 1) for size in (1, 2, 4, 8, 16)),
    ],
)
def test_what_does_not_keep_kv_from_being_of_use(other: KVLayout) -> None:
    assert difference(other, LAYOUT) is None
    assert other.digest == LAYOUT.digest


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(LAYOUT, dtype="float16"), "dtype float16 (here bfloat16)"),
        (replace(LAYOUT, model_digest="c" * 64), "model digest cccccccccccc (here aaaaaaaaaaaa)"),
        (replace(LAYOUT, tokenizer_digest="c" * 64), "tokenizer digest cccccccccccc (here bbb"),
        (replace(LAYOUT, tokenizer_digest=""), "tokenizer digest none (here bbbbbbbbbbbb)"),
        (replace(LAYOUT, codec=FP8), "codec fp8, not exact (here plain)"),
        (group(layers=(0, 4)), "layers [[0, 4], [1, 3]] (here [[0, 2], [1, 3]])"),
        (group(num_heads=4), "heads [4, 8] (here [8, 8])"),
        (group(head_dim=5), "head_dim [5, 4] (here [4, 4])"),
        (group(kind="chunked", window=5), "kinds ['chunked', 'sliding'] (here ['full', "),
        (group(window=5), "windows [5, 10] (here [None, 10])"),
        (replace(LAYOUT, groups=(FULL,)), "layers [[0, 2]] (here [[0, 2], [1, 3]])"),
        (replace(LAYOUT, tp_size=2, tp_rank=1), "heads [16, 16] (here [8, 8])"),
    ],
)
def test_what_does_is_named_with_both_values(other: KVLayout, said: str) -> None:
    found = difference(other, LAYOUT)
    assert found is not None
    assert said in found
    assert other.digest != LAYOUT.digest


def test_what_is_not_exact_fits_itself_alone() -> None:
    ours = replace(LAYOUT, codec=FP8)
    assert difference(ours, ours) is None
    assert difference(replace(LAYOUT, codec=WeightCodec("int4", exact=False)), ours) is not None
    assert difference(LAYOUT, ours) == "codec plain (here fp8, not exact)"


def test_the_digest_and_the_words_agree() -> None:
    draw = random.Random(7)

    def some() -> KVLayout:
        groups = (replace(FULL, num_heads=draw.choice([2, 4]), block_tokens=draw.choice([1, 16])),)
        return KVLayout(
            groups=(*groups, LATENT)[: draw.choice([1, 2])],
            dtype=draw.choice(["float32", "bfloat16"]),
            model_digest=draw.choice("ab"),
            tokenizer_digest=draw.choice("ab"),
            codec=draw.choice([PLAIN, U12, FP8]),
        ).cut(size := draw.choice([1, 2, 8]), draw.randrange(size))

    pairs = [(some(), some()) for _ in range(2000)]
    fitting = [difference(theirs, ours) is None for theirs, ours in pairs]
    assert fitting == [theirs.digest == ours.digest for theirs, ours in pairs]
    assert 20 < sum(fitting) < 1000


def test_hostile_names_do_not_make_long_messages() -> None:
    other = replace(LAYOUT, dtype="x" * 10_000, model_digest="y" * 10_000)
    assert len(difference(other, LAYOUT) or "") < 300


@pytest.mark.parametrize(
    ("tp_size", "num_heads", "num_copies", "heads"),
    [
        (1, 8, 1, [range(8)]),
        (2, 4, 1, [range(4), range(4, 8)]),
        (8, 1, 1, [range(n, n + 1) for n in range(8)]),
        (16, 1, 2, [range(n // 2, n // 2 + 1) for n in range(16)]),
    ],
)
def test_heads_are_shared_out(
    tp_size: int, num_heads: int, num_copies: int, heads: list[range]
) -> None:
    ours = LAYOUT.cut(tp_size, 0)
    first = ours.groups[0]
    assert (first.num_heads, first.num_copies) == (num_heads, num_copies)
    assert [ours.heads(first, rank) for rank in range(tp_size)] == heads
    assert ours.model_heads(first) == 8
    assert ours.exported_bytes(21) * tp_size == LAYOUT.exported_bytes(21) * num_copies
    assert ours.cut(1, 0) == LAYOUT


@pytest.mark.parametrize(
    ("groups", "tp_size", "parts"),
    [
        ((FULL,), 1, (0,)),
        ((FULL, SLIDING), 4, (0, 1, 2, 3)),
        ((FULL,), 16, (0, 2, 4, 6, 8, 10, 12, 14)),
        ((LATENT,), 4, (0,)),
        ((FULL, LATENT), 2, (0, 1)),
        ((replace(FULL, num_heads=2), replace(SLIDING, num_heads=4)), 8, (0, 2, 4, 6)),
    ],
)
def test_the_fewest_ranks_that_have_all(
    groups: tuple[KVGroup, ...], tp_size: int, parts: tuple[int, ...]
) -> None:
    assert replace(LAYOUT, groups=groups).cut(tp_size, 0).parts == parts


def test_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="8 KV heads cannot be shared out to 3 ranks"):
        LAYOUT.cut(3, 0)


@pytest.mark.parametrize(
    ("ranks", "copies"), [((2, 2), 1), ((-1, 1), 1), ((0, 0), 1), ((0, 4), 3), ((0, 4), 0)]
)
def test_ranks_that_do_not_add_up_are_no_layout(ranks: tuple[int, int], copies: int) -> None:
    about = msgspec.to_builtins(LAYOUT)
    about |= {"tp_rank": ranks[0], "tp_size": ranks[1]}
    about["groups"][0]["num_copies"] = copies
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(about, KVLayout)
