"""KV out to a file and in again, with other blocks and another block size."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from infire.kv_cache import KVCache, cells_of
from infire.kv_layout import KVGroup, KVLayout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layout(*, block_tokens: int = 4, dtype: str = "bfloat16") -> KVLayout:
    """Layers 0 and 2 see all, 1 and 3 a window of 10."""
    sizes = {"num_heads": 2, "head_dim": 8, "block_tokens": block_tokens}
    return KVLayout(
        groups=(
            KVGroup(kind="full", layers=(0, 2), **sizes),
            KVGroup(kind="sliding", layers=(1, 3), window=10, **sizes),
        ),
        dtype=dtype,
        model_digest="0",
    )


def cache(about: KVLayout, num_tokens: int, device: str = "cpu") -> tuple[KVCache, list[list[int]]]:
    """A cache, and block tables for so many tokens in blocks that are strewn over it."""
    num_blocks = -(-num_tokens // about.groups[0].block_tokens)
    tables = []
    for n in range(len(about.groups)):
        ids = list(range(num_blocks + 5))
        random.Random(n).shuffle(ids)
        tables.append(ids[:num_blocks])
    return KVCache(about, [num_blocks + 5] * len(about.groups), torch.device(device)), tables


def fill(kv: KVCache, tables: list[list[int]], num_tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Write random KV of so many tokens to every layer; what was written."""
    torch.manual_seed(1)
    written = []
    for layer in kv.layers:
        group = kv.layout.groups[layer.group]
        cells = cells_of(group, np.array(tables[layer.group]), np.arange(num_tokens))
        size = (num_tokens, group.num_heads, group.head_dim)
        k, v = torch.randn(size).to(layer.k), torch.randn(size).to(layer.v)
        layer.write(k, v, torch.from_numpy(cells).to(layer.k.device))
        written.append((k, v))
    return written


def read(kv: KVCache, tables: list[list[int]], layer: int, positions: range) -> torch.Tensor:
    """(2, T, heads, size): K and V of some positions."""
    view = kv.layers[layer]
    group = kv.layout.groups[view.group]
    cells = torch.from_numpy(cells_of(group, np.array(tables[view.group]), np.array(positions)))
    cells = cells.to(view.k.device)
    return torch.stack([plane.flatten(0, 1)[cells] for plane in (view.k, view.v)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 9, 10, 37])
def test_another_engine_reads_what_was_written(
    tmp_path: Path, num_tokens: int, device: str
) -> None:
    ours, tables = cache(layout(), num_tokens, device)
    written = fill(ours, tables, num_tokens)
    path = str(tmp_path / "kv")
    assert ours.export(tables, num_tokens, path) == layout().exported_bytes(num_tokens)

    theirs, their_tables = cache(layout(block_tokens=7), num_tokens, device)
    assert theirs.layout.digest == ours.layout.digest
    theirs.adopt(their_tables, num_tokens, path)
    for n, both in enumerate(written):
        first = theirs.layout.groups[theirs.layers[n].group].first_visible(num_tokens)
        found = read(theirs, their_tables, n, range(first, num_tokens))
        assert torch.equal(found, torch.stack(both)[:, first:])


def test_the_file_is_in_token_order_group_after_group_layer_after_layer(tmp_path: Path) -> None:
    about = layout(dtype="float32")
    ours, tables = cache(about, 12)
    written = fill(ours, tables, 12)
    ours.export(tables, 12, str(tmp_path / "kv"))
    content = np.fromfile(tmp_path / "kv", np.float32)
    expected = [torch.stack(written[n]) for n in (0, 2)]
    expected += [torch.stack(written[n])[:, 3:] for n in (1, 3)]  # position 12 sees 3 to 11
    assert content.tolist() == torch.cat([part.flatten() for part in expected]).tolist()


def test_a_file_of_another_size_is_refused_and_nothing_is_read(tmp_path: Path) -> None:
    ours, tables = cache(layout(), 8)
    path = tmp_path / "kv"
    path.write_bytes(b"\1" * (layout().exported_bytes(8) - 1))
    with pytest.raises(ValueError, match="2047 bytes for the KV of 8 tokens, not 2048"):
        ours.adopt(tables, 8, str(path))
    assert not any(layer.k.any() or layer.v.any() for layer in ours.layers)


def test_an_export_never_writes_over_a_file(tmp_path: Path) -> None:
    ours, tables = cache(layout(), 8)
    path = tmp_path / "kv"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        ours.export(tables, 8, str(path))
    assert path.read_text() == "mine"


def test_a_file_that_cannot_be_finished_is_removed(tmp_path: Path) -> None:
    ours, tables = cache(layout(), 8)
    path = tmp_path / "kv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk would
    try:
        with pytest.raises(OSError, match="File too large"):
            ours.export(tables, 8, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_an_empty_cache_takes_no_memory() -> None:
    group = KVGroup(kind="full", layers=(0,), num_heads=8, head_dim=128)
    about = KVLayout(groups=(group,), dtype="float32", model_digest="0")
    before = memory_bytes()
    kv = KVCache(about, [1 << 13], torch.device("cpu"))
    assert kv.layers[0].k.nbytes == 1 << 29
    assert memory_bytes() - before < 1 << 26


def memory_bytes() -> int:
    return psutil.Process().memory_info().rss
