"""A region, and what it last said of itself."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Role = Literal["edge", "front", "prefill", "decode", "both"]
Task = Literal["text-generation", "text-embeddings"]


class Place(Struct, frozen=True):
    latitude: float  # degrees, north positive
    longitude: float  # degrees, east positive


class Region(Struct, frozen=True, kw_only=True):
    """What an edge is told of a region by its operator."""

    name: str
    url: str  # the front's, http://host:port
    place: Place


class ModelReport(Struct, frozen=True, kw_only=True):
    """One model that a worker or a region serves now."""

    model: str
    model_digest: str
    tokenizer_digest: str
    context_window: int  # tokens, prompt and output together
    max_sequence_tokens: int  # what one request's KV may hold; at most context_window
    task: Task = "text-generation"
    # How many more requests for it a region would take now; None: as its report says for all.
    room: int | None = None


class ProcessReport(Struct, frozen=True, kw_only=True):
    """One process of the fleet, as `fleet status` shows it."""

    name: str
    region: str
    role: Role
    pid: int
    url: str
    epoch: str  # one life of the process: a restart at the same address has another
    ready: bool = True  # a step was made lately
    in_flight: int = 0  # requests accepted and not ended
    waiting: int = 0  # of those, not yet running
    held: int = 0  # finished prefills whose KV waits to be collected
    free_blocks: int = 0  # KV blocks, all groups
    total_blocks: int = 0
    prompt_tokens_computed: int = 0  # since start: forward-pass tokens that belonged to a prompt
    max_waiting: int = 0  # requests it queues before it refuses
    max_running: int = 0  # requests it computes at a time; 0: not said
    models: tuple[ModelReport, ...] = ()
    loading: tuple[str, ...] = ()  # models that it will serve once they are loaded


class RegionReport(Struct, frozen=True, kw_only=True):
    """What a front says of its region. `room` is how many more requests it would take now."""

    region: str
    epoch: str
    room: int
    models: tuple[ModelReport, ...]
    processes: tuple[ProcessReport, ...]
    loading: tuple[str, ...] = ()  # models that no worker serves yet, and some will
