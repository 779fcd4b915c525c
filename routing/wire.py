"""What an edge worker and a region say to each other: MessagePack over a link, a few by HTTP.

Every union member carries a tag, so a decoder of the union needs no envelope. Knows no socket.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

import msgspec
from msgspec import Struct

from routing.errors import Code

Reason = Literal["stop", "length"]
Pooling = Literal["mean", "cls"]  # of a text's vectors, or that of its first token


class Sampling(Struct, frozen=True, kw_only=True):
    """How to choose tokens. Defaults are neutral; ranges are checked at the edge."""

    max_tokens: int
    seed: int  # the edge draws one when the client gives none: a resumed stream must draw the same
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, multiplicative (CTRL paper, 4.1)
    frequency_penalty: float = 0.0  # over output, per occurrence
    presence_penalty: float = 0.0  # over output, once
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; n >= 0: the chosen token's and the n likeliest's
    stop_ids: tuple[int, ...] = ()
    speculate: bool = True  # guess ahead where that is faster; what is said stays the same


class Grammar(Struct, frozen=True):
    """What the output must match.

    `source`: nothing, a JSON schema, a regular expression in Rust's syntax, a JSON array of texts,
    or a grammar in llguidance's dialect of Lark (which the edge writes for calls of tools).
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    source: str


class Generate(Struct, frozen=True, kw_only=True, tag="generate"):
    """Edge to region: the whole request, in token ids."""

    request_id: str
    tenant_salt: bytes  # from the key, never from a body: separates tenants' prefix caches
    model: str
    tokenizer_digest: str  # a region that tokenises otherwise refuses (STALE_TOKENIZER)
    token_ids: tuple[int, ...]  # the prompt
    generated_ids: tuple[int, ...] = ()  # already made elsewhere, when a stream resumes
    sampling: Sampling  # max_tokens counts generated_ids too
    grammar: Grammar | None = None
    adapter: str | None = None
    priority: int = 0  # higher goes first; below 0: for capacity that nobody else wants
    reject_if_busy: bool = False  # refuse (NO_CAPACITY) what could not begin at once
    affinity: bytes = b""  # of its session or beginning: equal ones go to the same worker
    budget_s: float  # time left, not a time of day: clocks differ between machines

    @property
    def never_waits(self) -> bool:
        """Whether it is refused where it would have to wait for others."""
        return self.reject_if_busy or self.priority < 0

    @property
    def num_prompt(self) -> int:
        return len(self.token_ids)


class Embed(Struct, frozen=True, kw_only=True, tag="embed"):
    """Edge to region: texts, in token ids, to make a vector of each."""

    request_id: str
    tenant_salt: bytes
    model: str
    tokenizer_digest: str
    texts: tuple[tuple[int, ...], ...]  # each as the model reads it, special tokens included
    pooling: Pooling | None = None  # None: as the model's makers have it
    priority: int = 0  # below 0: for capacity that nobody else wants
    reject_if_busy: bool = False
    budget_s: float

    @property
    def never_waits(self) -> bool:
        return self.reject_if_busy or self.priority < 0

    @property
    def num_prompt(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


class Logprob(Struct, frozen=True, array_like=True):
    """Natural logarithms of the model's probabilities, before temperature and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens one request used. `completion_tokens` includes those made before a resume."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Started(Struct, frozen=True, tag="started"):
    """The request is running; comes before the first token."""

    cached_tokens: int = 0  # prompt tokens found in a prefix cache


class Tokens(Struct, frozen=True, tag="tokens", gc=False):
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()  # as long as ids where asked for, else empty


class Finish(Struct, frozen=True, tag="finish"):
    """The last event of a request that went well. A stop id, when one ended it, was in `Tokens`."""

    reason: Reason
    usage: Usage


class Fault(Struct, frozen=True, tag="fault"):
    """The last event of a request that did not go well."""

    code: Code
    detail: str
    retry_after_s: float | None = None


class Embedded(Struct, frozen=True, kw_only=True, tag="embedded"):
    """The whole answer to an `Embed`, its last event: of 100 texts 150 kB, or 1.6 MB at most."""

    vectors: bytes  # float32, little-endian, one text after the other
    width: int  # numbers of a vector
    pooling: Pooling  # that was used
    prompt_tokens: int  # of all texts


Request = Generate | Embed
Event = Started | Tokens | Finish | Embedded | Fault


class TextAssets(Struct, frozen=True, kw_only=True):
    """What turns a model's text into ids and back; served by digest, so it never goes stale."""

    tokenizer_json: bytes  # the Hugging Face `tokenizers` file
    chat_template: str  # jinja2
    special_tokens: dict[str, str] = {}  # bos_token, eos_token, ...: what templates may name
    stop_ids: tuple[int, ...] = ()  # end-of-text ids
    generation_defaults: dict[
        str, float
    ] = {}  # temperature, top_p, ... as the model's makers advise

    @property
    def digest(self) -> str:
        """Identifies every byte above. Field order is fixed, so the encoding is too."""
        return sha256(msgspec.msgpack.encode(self, order="deterministic")).hexdigest()


def merge(first: Tokens, then: Tokens) -> Tokens:
    """Two bursts as one: what a slow reader gets instead of a longer queue."""
    return Tokens(first.ids + then.ids, first.logprobs + then.logprobs)
