"""What a worker and its engine process say to each other, one MessagePack frame each way a step.

Framing on the socket pair: 4 bytes little-endian length, then the frame. Acts (`Note`) are read
between steps, so none sees a step half done. No torch, no socket.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from infire.kv_layout import KVLayout
from infire.request import Sequence, Step

PREFIX_BYTES = 4  # of a frame: its length

Task = Literal["text-generation", "text-embeddings"]
Pooling = Literal["mean", "cls"]  # of a text's vectors, or that of its first token


def take_frames(received: bytearray) -> list[bytearray]:
    """The frames that have arrived whole, without their prefixes; removed from `received`."""
    frames, begin = [], 0
    while len(received) - begin >= PREFIX_BYTES:
        body = begin + PREFIX_BYTES
        end = body + int.from_bytes(received[begin:body], "little")
        if end > len(received):
            break
        frames.append(received[body:end])
        begin = end
    del received[:begin]
    return frames


class Submit(Struct, frozen=True, tag="submit"):
    """Run `sequence`. With `kv_path`, the KV of its first `num_adopted` tokens lies there.

    With `export_path`, its KV is written to a new file there, some as it is computed, the rest
    when it has to be held: `Exported` tells of each piece.
    """

    sequence: Sequence
    kv_path: str | None = None
    num_adopted: int = 0
    piece_ends: tuple[int, ...] = ()  # of the file at `kv_path`, in tokens; none: it is one
    export_path: str | None = None


class Drop(Struct, frozen=True, tag="drop"):
    """Forget a request wherever it is: waiting, running or held, and remove its export. Unknown ids
    are ignored."""

    request_id: str


class EmbedTexts(Struct, frozen=True, kw_only=True, tag="embed"):
    """Make a vector of each text; answered by `Embedded` when all are there, or `Refused`."""

    request_id: str
    texts: tuple[tuple[int, ...], ...]  # ids, as the model reads them
    pooling: Pooling | None = None  # None: as the model's makers have it


Note = Submit | EmbedTexts | Drop


class Notes(Struct, frozen=True):
    """One frame to the engine."""

    notes: tuple[Note, ...]


class Exported(Struct, frozen=True, tag="exported"):
    """So much of the KV of a `Submit` with `export_path` is in its file now."""

    request_id: str
    num_bytes: int
    num_tokens: int


class Adopted(Struct, frozen=True, tag="adopted"):
    """The file of a `Submit` has been read: it may be deleted."""

    request_id: str


class Refused(Struct, frozen=True, tag="refused"):
    """A request ended without its answer. `code` is a label of `routing.errors.Code`."""

    request_id: str
    code: str
    detail: str


class Embedded(Struct, frozen=True, kw_only=True, tag="embedded"):
    """All vectors of an `EmbedTexts`, in its order."""

    request_id: str
    vectors: bytes  # float32, little-endian, one text after the other
    width: int  # numbers of a vector
    pooling: Pooling  # that was used


Answer = Exported | Adopted | Refused | Embedded


class Gauges(Struct, frozen=True, kw_only=True, array_like=True):
    """The engine between two steps."""

    step: int  # steps made since start
    running: int = 0
    waiting: int = 0
    held: int = 0
    free_blocks: int = 0  # all groups together
    total_blocks: int = 0
    prompt_tokens_computed: int = 0  # since start
    output_tokens: int = 0  # since start
    preemptions: int = 0  # since start
    draft_tokens_proposed: int = 0  # since start: guessed, and verified in a step
    draft_tokens_accepted: int = 0  # since start: of these, what became output
    step_s: float = 0.0  # seconds the last step took
    prompt_tokens_cached: int = 0  # since start: found in blocks, and not computed
    host_blocks: int = 0  # of the prefix cache in host memory
    disk_blocks: int = 0  # and in files
    host_blocks_found: int = 0  # since start: found there, and loaded
    disk_blocks_found: int = 0


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """The engine's first frame: loaded, warm, ready for notes."""

    model: str
    model_digest: str
    layout: KVLayout
    context_window: int  # tokens, as the model's configuration says
    max_sequence_tokens: int  # what the KV pool holds for one request; at most context_window
    vocab_size: int
    device: str
    dtype: str
    threads: int
    load_s: float
    grammars: bool = False  # whether outputs can be made to match one
    task: Task = "text-generation"


class Results(Struct, frozen=True, tag="results"):
    """One frame from the engine: after every step, and at least once a second when idle."""

    gauges: Gauges
    steps: tuple[Step, ...] = ()
    answers: tuple[Answer, ...] = ()
    cached: tuple[bytes, ...] = ()  # keys that came into the prefix cache; see infire.prefix
    uncached: tuple[bytes, ...] = ()  # and that it has no longer


class Broken(Struct, frozen=True, tag="broken"):
    """The engine could not start, or must stop: the reason, for the operator."""

    detail: str


FromEngine = Hello | Results | Broken
