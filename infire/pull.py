"""Make a model folder, whole or not at all. Knows folders and digests, no catalogue.

The folder is built under another name beside the final one and renamed at the end, with its
manifest, `edgefire.json`, so an interrupted pull leaves nothing that looks done.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)

from infire.model.config import BadModel
from infire.sources import PullError, Source, console, fetch, kept_files, parse_source
from infire.weight_files import bundle_shard, weights_digest

MANIFEST = "edgefire.json"
_NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json"}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # instead, where the weights are in several files
_READ_BYTES = 1 << 20
_SHOWN_BYTES = 1 << 24  # less is read at once
_FULL = {errno.ENOSPC, errno.EDQUOT}

Stamp = tuple[int, int]  # bytes, nanoseconds of the last change


class Manifest(Struct, frozen=True, kw_only=True):
    """What `edgefire.json` says of the folder it is in."""

    source: str
    sha256: str | None = None  # of the fetched file, if it was one
    model_digest: str  # SHA-256 of the weights: all their files, unpacked, by name, in one
    files: dict[str, str]  # name: SHA-256
    stamps: dict[str, Stamp]  # name: what it had when it was hashed
    origin: dict[str, Stamp]  # the same of a local source's files


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]  # tensor: file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    source: Source
    sha256: str | None  # of the fetched file
    model_digest: str | None


def pull(
    source: str,
    into: Path,
    *,
    sha256: str | None = None,
    model_digest: str | None = None,
    verify: bool = False,
) -> None:
    """Make the model folder `into`, unless it is complete already. Raises PullError.

    `sha256` is what the fetched file must have, `model_digest` what the weights must have in the
    end. A complete folder is recognised by its manifest and its files' sizes and times; a file
    with another time is read again, and with `verify` every file is. Two pulls into one folder:
    the second waits for the first.
    """
    wanted = _Wanted(source=parse_source(source), sha256=sha256, model_digest=model_digest)
    into = into.resolve()
    try:
        if _is_complete(into, wanted, verify=verify) and not _left_over(into):
            return
        into.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(into):
            if not _is_complete(into, wanted, verify=verify):  # by another, while we waited
                _make(into, wanted)
    except OSError as error:
        raise PullError(_reason(error, into)) from error


@contextmanager
def _only_one(into: Path) -> Iterator[None]:
    """Hold the folder's lock; what interrupted pulls left behind is swept while holding it."""
    with (into.parent / f".{into.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for another process that pulls {into.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in _left_over(into):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _left_over(into: Path) -> list[Path]:
    """The work folders of pulls that are at work, or were interrupted."""
    return list(into.parent.glob(f"{glob.escape(_work_name(into))}*"))


def _work_name(into: Path) -> str:
    return f".{into.name}.pulling-"


def _is_complete(into: Path, wanted: _Wanted, *, verify: bool) -> bool:
    """Whether `into` already holds what is wanted."""
    try:
        found = msgspec.json.decode((into / MANIFEST).read_bytes(), type=Manifest)
        stamps = {name: _stamp(into / name) for name in found.files}
    except (OSError, msgspec.DecodeError):
        return False
    if found.source != str(wanted.source) or _origin(wanted.source) not in ({}, found.origin):
        return False
    if wanted.sha256 not in (None, found.sha256):
        return False
    if wanted.model_digest not in (None, found.model_digest):
        return False
    for name, stamp in stamps.items():
        known = found.stamps.get(name)
        if (verify or stamp != known) and file_digest(into / name) != found.files[name]:
            return False
    if stamps != found.stamps:  # copied or restored, but the same
        with suppress(OSError):  # where nothing may be written, it is read again each time
            _write_manifest(into, msgspec.structs.replace(found, stamps=stamps))
    return True


def _make(into: Path, wanted: _Wanted) -> None:
    if into.exists() and not (into / MANIFEST).exists() and any(into.iterdir()):
        raise PullError(f"{into} is in the way: it holds files, and was not made by a pull")
    work = into.parent / f"{_work_name(into)}{secrets.token_hex(4)}"
    folder = work / "folder"
    try:
        folder.mkdir(parents=True)
        fetched = fetch(wanted.source, work)
        origin = _origin(wanted.source)  # before it is read: a later change shows
        sha256 = None
        if fetched.file is not None:
            sha256 = file_digest(fetched.file)
            _expect(fetched.file.name, sha256, wanted.sha256)
        elif wanted.sha256:
            raise PullError(f"{wanted.source} is a folder: it has a model digest, but no SHA-256")
        if fetched.path.is_dir():
            _take(fetched.path, folder)
        else:
            _convert(fetched.path, folder)
        _seal(folder, wanted, sha256, origin)
        if into.exists():  # damaged, or of another source
            into.rename(work / "replaced")
        folder.rename(into)
        _flush(into.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take(source: Path, folder: Path) -> None:
    """Copy the model's files; the weights, which are large, are linked if they can be."""
    for name, file in kept_files(source).items():
        target = folder / name
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target)
            continue
        try:
            os.link(file.resolve(), target)
        except OSError:  # another file system, or another user's file
            console.print(f"copying {file.name}")
            shutil.copyfile(file, target)


def _convert(file: Path, folder: Path) -> None:
    from infire.gguf_folder import write_folder  # slow to import, and often not needed
    from infire.gguf_weights import UnsupportedFile

    console.print(f"converting {file.name} to BF16")
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task("tensors", total=None)
        try:
            write_folder(
                file, folder, lambda done, total: bar.update(task, completed=done, total=total)
            )
        except UnsupportedFile as error:
            raise PullError(f"{file.name}: {error}") from error


def _seal(folder: Path, wanted: _Wanted, sha256: str | None, origin: dict[str, Stamp]) -> None:
    """Write the manifest, after everything it speaks of has reached the disk."""
    files = {path.name: path for path in sorted(folder.iterdir())}
    if missing := sorted((_NEEDED | _weights(folder)) - files.keys()):
        raise PullError(f"{wanted.source} holds no {' and no '.join(missing)}")
    digests = {name: file_digest(path) for name, path in files.items()}
    weights = [path for path in files.values() if path.suffix == ".safetensors"]
    try:
        plain = len(weights) == 1 and bundle_shard(weights[0]) is None  # and hashed already
        found = digests[weights[0].name] if plain else weights_digest(weights)
    except BadModel as error:
        raise PullError(str(error)) from error
    _expect("the weights", found, wanted.model_digest)
    for path in files.values():
        _flush(path)
    manifest = Manifest(
        source=str(wanted.source),
        sha256=sha256,
        model_digest=found,
        files=digests,
        stamps={name: _stamp(path) for name, path in files.items()},
        origin=origin,
    )
    _write_manifest(folder, manifest)


def _weights(folder: Path) -> set[str]:
    """The files that hold a model's weights: one, or those that its index names."""
    if not (folder / _INDEX).exists():
        return {_WEIGHTS}
    try:
        index = msgspec.json.decode((folder / _INDEX).read_bytes(), type=_Index)
    except msgspec.DecodeError as error:
        raise PullError(f"{_INDEX}: {error}") from error
    return set(index.weight_map.values())


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    draft = folder / f".{MANIFEST}-{secrets.token_hex(4)}"
    draft.write_bytes(text + b"\n")
    _flush(draft)
    draft.replace(folder / MANIFEST)
    _flush(folder)


def file_digest(*paths: Path) -> str:
    """SHA-256 of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    with _bar(DownloadColumn(), hidden=total < _SHOWN_BYTES) as bar:
        task = bar.add_task(f"checking {paths[0].name}", total=total)
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
                    bar.update(task, advance=len(chunk))
    return digest.hexdigest()


def _expect(name: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise PullError(f"{name}: SHA-256 is {found}, expected {expected}")


def _origin(source: Source) -> dict[str, Stamp]:
    """What a local source is now; nothing if it is not local, or gone."""
    path = Path(source.name)
    if source.kind != "path" or not path.exists():
        return {}
    files = kept_files(path) if path.is_dir() else {path.name: path}
    return {name: _stamp(file) for name, file in files.items()}


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError, into: Path) -> str:
    if error.errno in _FULL:
        place = next(parent for parent in into.parents if parent.exists())
        return f"disk full: {shutil.disk_usage(place).free / 1e6:.0f} MB are free in {place}"
    return f"{into}: {error}"


def _bar(count: DownloadColumn | MofNCompleteColumn, *, hidden: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        count,
    )
    return Progress(
        *columns, console=console, transient=True, disable=hidden or not console.is_terminal
    )
