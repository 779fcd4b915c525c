"""`unweight`: pack, unpack and check bundles, and look into them. The only file that prints."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from unweight.histogram import NoPlots, bars, draw
from unweight.safetensors_header import BadFile
from unweight.samples import LAYERS
from unweight.stat import Stat, Tensor, Total, measure, of_files, of_layer
from unweight.writer import (
    Refused,
    check_folder,
    pack_folder,
    size_on_disk,
    total_bytes,
    unpack_folder,
    weight_files,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="BF16 weights in fewer bits, none of them lost.",
)

Threads = Annotated[int, typer.Option(min=0, help="0: one a usable core.")]
_REASONS = 5  # that are told
_WIDTH = 120  # columns of a table that no terminal limits


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A model folder, or a safetensors file.")],
    out: Annotated[Path, typer.Argument(help="The bundle to make.")],
    threads: Threads = 0,
) -> None:
    """Make a bundle of a model folder: two thirds of the bytes, and ordinary safetensors."""
    with _telling(source, unpacked=False, named="pack") as bar:
        made = pack_folder(source, out, threads=threads or _usable(), progress=bar.advance)
        bar.end(f"{_made(made)}{_sizes(source, out)}")


@app.command()
def unpack(
    bundle: Annotated[Path, typer.Argument(help="Made by `unweight pack`.")],
    out: Annotated[Path, typer.Argument(help="The folder, or file, to make.")],
    threads: Threads = 0,
) -> None:
    """Make the folder again that was packed, every file byte for byte."""
    with _telling(bundle, unpacked=True, named="unpack") as bar:
        made = unpack_folder(bundle, out, threads=threads or _usable(), progress=bar.advance)
        bar.end(f"{_made(made)}{_sizes(bundle, out)}")


@app.command()
def check(
    bundle: Annotated[Path, typer.Argument(help="Made by `unweight pack`.")], threads: Threads = 0
) -> None:
    """Decode all of a bundle, and compare every digest."""
    with _telling(bundle, unpacked=True, named="check", copies=False) as bar:
        found = check_folder(bundle, threads=threads or _usable(), progress=bar.advance)
        for name, sha256 in found.items():
            print(f"{sha256}  {name}")
        bar.end("whole")


@app.command()
def stat(  # noqa: PLR0913  one parameter a flag
    source: Annotated[Path | None, typer.Argument(help="A model folder, file or bundle.")] = None,
    *,
    png: Annotated[Path | None, typer.Option(help="The histogram, as a picture.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
    as_bf16: Annotated[bool, typer.Option("--as-bf16", help="Round FP32 to BF16 first.")] = False,
    all_tensors: Annotated[bool, typer.Option("--all", help="Vectors and the like, too.")] = False,
    synthetic: Annotated[
        str | None, typer.Option(help=f"Instead of a source: {', '.join(LAYERS)}.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """What tensors take, in a bundle and resident, and how their exponents are spread."""
    with _one_line_errors("stat"):
        if (source is None) == (synthetic is None):
            raise Refused("give one SOURCE, or --synthetic LAYER")
        if synthetic is not None and synthetic not in LAYERS:
            raise Refused(f"--synthetic {synthetic!r} is not one of {', '.join(LAYERS)}")
        if source is not None:
            tensors = of_files(weight_files(source), as_bf16=as_bf16)
        else:
            tensors = of_layer(synthetic or "")
        found = measure(
            synthetic or str(source), tensors, threads=threads or _usable(), rounded=as_bf16
        )
        if json:
            print(msgspec.json.format(msgspec.json.encode(found)).decode())
        else:
            _show(found, all_tensors=all_tensors)
        if png is not None:
            draw(found.exponents, f"Exponents of {Path(found.source).name}", png)


def _show(found: Stat, *, all_tensors: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensor", overflow="fold", ratio=1)
    for head in ("type", "shape", "H(exp)", "bundle", "tiles", "strips", "exceptions"):
        table.add_column(head, justify="right", no_wrap=True)
    shown = [t for t in found.tensors if all_tensors or t.tile_bits is not None]
    for tensor in shown:
        table.add_row(*_row(tensor))
    console.print(table)
    console.print()
    for line in _asides(found, [t for t in found.tensors if t not in shown]):
        console.print(line)
    for name, total in (("linear weights", found.linear), ("all tensors", found.everything)):
        if total is not None:
            console.print(_told(name, total))
    console.print()
    for line in bars(found.exponents, console.width):
        console.print(line, soft_wrap=True)


def _row(tensor: Tensor) -> list[str]:
    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    row = [tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar"]
    row += [number(tensor.entropy, 2), number(tensor.bundle_bits)]
    if tensor.why_raw is not None:
        return [*row, tensor.why_raw, "", ""]
    return [
        *row, number(tensor.tile_bits), number(tensor.strip_bits), f"{tensor.exceptions:.4%}"
    ]  # fmt: skip


def _asides(found: Stat, left_out: list[Tensor]) -> Iterator[str]:
    yield "H(exp): bits of entropy of an exponent; other columns: bits a weight, all of it."
    if found.rounded:
        yield "FP32 was rounded to BF16 first: all figures are of the rounded weights."
    if left_out:
        weights = sum(tensor.num_weights for tensor in left_out)
        yield f"{len(left_out)} tensors, {weights:,} weights, resident as they are (see --all):"
        reasons = Counter(tensor.why_raw for tensor in left_out).most_common()
        yield from (f"  {count} x {reason}" for reason, count in reasons[:_REASONS])
        if len(reasons) > _REASONS:
            yield f"  {sum(count for _, count in reasons[_REASONS:])} x others of that kind"


def _told(name: str, total: Total) -> str:
    def of(bits: float) -> str:
        return f"{bits:.3f} ({bits / max(total.source_bits, 1):.2%})"

    entropy = "" if total.entropy is None else f", H(exp) {total.entropy:.2f}"
    return (
        f"{name}: {total.num_weights:,} of {total.source_bits:.2f} bits{entropy}; bundle "
        f"{of(total.bundle_bits)}, tiles {of(total.tile_bits)}, strips {of(total.strip_bits)}"
    )


class _Bar:
    """Progress of one command, shown where someone is looking."""

    def __init__(self, progress: Progress, named: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(named, total=total)
        self._began = perf_counter()
        self._done = 0

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress.advance(self._task, num_bytes)

    def end(self, text: str) -> None:
        took = max(perf_counter() - self._began, 1e-9)
        self._progress.stop()
        print(f"{text}; {took:.2f} s, {self._done / took / 1e6:,.0f} MB/s")


@contextmanager
def _telling(source: Path, *, unpacked: bool, named: str, copies: bool = True) -> Iterator[_Bar]:
    with _one_line_errors(named):
        progress = Progress(
            BarColumn(None),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        total = total_bytes(source, unpacked=unpacked, copies=copies)
        with progress:
            yield _Bar(progress, named, total)


@contextmanager
def _one_line_errors(named: str) -> Iterator[None]:
    try:
        yield
    except (BadFile, Refused, NoPlots) as error:
        _fail(named, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(named, f"{where}{error.strerror or error}")


def _fail(named: str, text: str) -> None:
    print(f"unweight {named}: {text}", file=sys.stderr)
    raise typer.Exit(1) from None


def _made(names: list[str]) -> str:
    return f"{len(names)} files made" if names else "everything is there already"


def _sizes(source: Path, out: Path) -> str:
    before, after = size_on_disk(source), size_on_disk(out)
    return f", {before:,} to {after:,} bytes ({after / max(before, 1):.2%})"


def _usable() -> int:
    """Cores this process may run on: a container or `taskset` may leave less than there are."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def main() -> None:
    app()


if __name__ == "__main__":
    main()
