"""What a front and a worker are told at their start. Read in `__main__.py`, then never changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import msgspec
from msgspec import Meta, Struct

from origin_gpu.waits import MAX_WAIT_S
from routing.drain import GRACE_S

WorkerRole = Literal["prefill", "decode", "both"]
KVWay = Literal["shared", "nixl"]

# A decode worker computes a prompt itself where it has to compute no more tokens than this.
# Measured by `loadtest.bench.interference --short`: up to here the others' longest gaps are those
# of a prompt that is handed over, and its own second token comes sooner (README.md has the table).
LOCAL_TOKENS = 48

_WORKER = re.compile(r"(?P<name>[^=@]+)=(?P<role>[a-z]+)@(?P<url>https?://[^/]+)/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAt:
    """A worker that a front is told of."""

    name: str
    role: WorkerRole
    url: str  # http://host:port


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    name: str
    region: str
    workers: tuple[WorkerAt, ...]
    secret_file: Path
    local_tokens: int = LOCAL_TOKENS
    journal: Path | None = None  # of usage; None: it is not kept
    journal_days: float = 7.0  # that a row of it is kept
    journal_rows: int = 1_000_000  # the most that are kept: about 200 MB
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    fd: int | None = None  # of an inherited listening socket, in the place of host and port
    grace_s: float = GRACE_S  # that requests have to end once it is told to stop
    max_wait_s: float = MAX_WAIT_S  # expected before a first token: over it, refused; 0: no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    name: str
    region: str
    role: WorkerRole
    model: str
    model_dir: Path
    secret_file: Path
    engine_command: tuple[str, ...]  # what starts the engine; its flags are added
    host: str = "127.0.0.1"
    port: int = 0
    fd: int | None = None
    device: str = "auto"  # cpu, cuda, or auto: a GPU that works, else the CPU
    dtype: str = "auto"  # bfloat16, float32, or auto: what the model was saved in
    kv_tokens: int = 16384  # tokens whose KV fits, all requests together
    block_tokens: int = 16  # tokens a KV block holds
    max_step_tokens: int = 512  # tokens one step computes: bounds what others wait for a prompt
    max_running: int = 64  # sequences a step serves
    max_waiting: int = 256  # requests queued before more are refused
    lease_s: float = 30.0  # after which computed KV that nobody collects is dropped
    stuck_s: float = 60.0  # an engine that says nothing for so long is started anew
    grace_s: float = GRACE_S  # that requests, and KV to collect, have once it is told to stop
    threads: int = 1  # of the engine on a CPU
    prefix_cache: bool = True  # prompts that begin alike share KV
    host_cache_bytes: int = 0  # of that KV which the device has no place for, in memory
    disk_cache_dir: Path | None = None  # and in files
    disk_cache_bytes: int = 8 << 30
    kv_ways: tuple[KVWay, ...] = ("shared",)  # that KV may go, best first; over TCP it always may


def parse_worker(text: str) -> WorkerAt:
    """`NAME=ROLE@URL` as a `WorkerAt`; ValueError says what is wrong with it."""
    match = _WORKER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not NAME=ROLE@URL, with a URL like http://host:port")
    if match["role"] not in get_args(WorkerRole):
        raise ValueError(f"{match['role']!r} in {text!r} is none of {get_args(WorkerRole)}")
    return WorkerAt(name=match["name"], role=cast("WorkerRole", match["role"]), url=match["url"])


class WorkerRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A worker as `PUT /v1/workers` names it."""

    name: Annotated[str, Meta(min_length=1)]
    role: WorkerRole
    url: str


def parse_workers(body: bytes) -> tuple[WorkerAt, ...]:
    """A JSON list of workers; ValueError names the row and field that is wrong."""
    try:
        rows = msgspec.json.decode(body, type=list[WorkerRow])
    except msgspec.DecodeError as exc:
        raise ValueError(str(exc)) from exc
    workers = tuple(parse_worker(f"{row.name}={row.role}@{row.url}") for row in rows)
    if not workers:
        raise ValueError("a region needs a worker")
    if len({at.name for at in workers}) < len(workers):
        raise ValueError("two workers have the same name")
    return workers


def parse_ways(text: str) -> tuple[KVWay, ...]:
    """`shared,nixl`, or `tcp` for neither; ValueError says what is wrong with it."""
    names = [name for name in text.split(",") if name != "tcp"]
    for name in names:
        if name not in get_args(KVWay):
            raise ValueError(f"{name!r} in {text!r} is none of {(*get_args(KVWay), 'tcp')}")
    return tuple(cast("KVWay", name) for name in names)
