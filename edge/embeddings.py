"""Embeddings and reranking in both APIs: their JSON in, vectors out as JSON. Pure.

Knows no HTTP, no model and no tokenizer.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from operator import mul
from typing import Any, ClassVar, Literal, Self, cast

import msgspec

from edge.checks import BadField, Fields, as_fields, mismatch, read, required
from edge.envelope import envelope
from edge.fallback import models_of
from edge.options import rejects_if_busy
from routing.region import Task
from routing.wire import Embedded, Pooling

MOST_TEXTS = 100  # natively, by Workers AI's documents; of a query and its contexts together, too
MOST_INPUTS = 2048  # by OpenAI's
_MOST_ID = 2**31 - 1

Format = Literal["native", "scores", "float", "base64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAsk:
    """What a client asked of a model that makes vectors."""

    task: ClassVar[Task] = "text-embeddings"
    stream: ClassVar[bool] = False
    model: str
    texts: tuple[str, ...] = ()  # either these
    token_ids: tuple[tuple[int, ...], ...] = ()  # or these, each as the model reads it
    field: Literal["text", "input", "contexts"]  # that texts came in
    format: Format
    pooling: Pooling | None = None
    dimensions: int | None = None  # that vectors must have
    top_k: int | None = None  # contexts to name, the best first; None: all
    fallbacks: tuple[str, ...] = ()
    reject_if_busy: bool = False

    def pointer(self, n: int) -> str:
        """Where in the body that text was."""
        if self.field != "contexts":
            return (
                f"/{self.field}" if len(self.texts or self.token_ids) == 1 else f"/{self.field}/{n}"
            )
        return f"/contexts/{n - 1}/text" if n else "/query"

    def of(self, model: str) -> Self:
        """The same of another model."""
        return replace(self, model=model)


def parse_fields(fields: Fields, model: str) -> EmbedAsk:
    """A native body. Raises Failure(BAD_INPUT) naming the field that is wrong."""
    reranks = fields.has("query") or fields.has("contexts")
    if reranks == fields.has("text"):
        either = f"{required('', 'text')}, {required('', 'query', 'contexts')}"
        many = "2 matches" if reranks else "0 matches"
        says = f"oneOf at '/' not met, {many}: {either}: {model} is for {EmbedAsk.task}"
        raise BadField("", says)
    texts = _query_and_contexts(fields) if reranks else _texts(fields, "text", MOST_TEXTS)
    return EmbedAsk(
        model=model,
        texts=texts,
        field="contexts" if reranks else "text",
        format="scores" if reranks else "native",
        pooling=_pooling(fields),
        top_k=fields.integer("top_k", 1, _MOST_ID) if reranks else None,
        reject_if_busy=rejects_if_busy(fields),
    )


def parse(body: bytes) -> EmbedAsk:
    """A body of OpenAI's. Raises Failure(BAD_INPUT) naming the field that is wrong."""
    fields = read(body)
    model, *fallbacks = models_of(fields)
    fields.need("input")
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    given = fields.value("input")
    if isinstance(given, list) and given and not isinstance(given[0], str):
        token_ids = _ids_of_all(given)
    else:
        texts = _texts(fields, "input", MOST_INPUTS)
    return EmbedAsk(
        model=model,
        fallbacks=tuple(fallbacks),
        texts=texts,
        token_ids=token_ids,
        field="input",
        format=cast("Format", _one_of(fields, "encoding_format", ("float", "base64")) or "float"),
        dimensions=fields.integer("dimensions", 1, _MOST_ID),
        pooling=_pooling(fields),
        reject_if_busy=rejects_if_busy(fields),
    )


def spelled(ask: EmbedAsk, made: Embedded) -> bytes:
    """The JSON body of the answer. Raises Failure(BAD_INPUT) for vectors of another size than was
    asked for."""
    if ask.dimensions not in {None, made.width}:
        says = f"'/dimensions': vectors of {ask.model} have {made.width} numbers, and no fewer"
        raise BadField("/dimensions", says)
    return _SPELLERS[ask.format](ask, made)


def vectors_of(made: Embedded) -> list[array[float]]:
    """Each text's, float32."""
    numbers = array("f", made.vectors)
    if sys.byteorder == "big":
        numbers.byteswap()
    return [numbers[at : at + made.width] for at in range(0, len(numbers), made.width)]


def _native(_: EmbedAsk, made: Embedded) -> bytes:
    data = [vector.tolist() for vector in vectors_of(made)]
    result = {"shape": [len(data), made.width], "data": data, "pooling": made.pooling}
    return msgspec.json.encode(envelope(result))


def _scores(ask: EmbedAsk, made: Embedded) -> bytes:
    query, *contexts = vectors_of(made)
    scores = [_cosine(query, context) for context in contexts]
    best = sorted(range(len(scores)), key=lambda at: -scores[at])[: ask.top_k]
    result = {"response": [{"id": at, "score": scores[at]} for at in best]}
    return msgspec.json.encode(envelope(result))


def _openai(ask: EmbedAsk, made: Embedded) -> bytes:
    spell = _base64 if ask.format == "base64" else _float
    data = [
        {"object": "embedding", "index": at, "embedding": spell(vector)}
        for at, vector in enumerate(vectors_of(made))
    ]
    used = {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": ask.model, "usage": used})


_SPELLERS: dict[Format, Callable[[EmbedAsk, Embedded], bytes]] = {
    "native": _native,
    "scores": _scores,
    "float": _openai,
    "base64": _openai,
}


def _float(vector: array[float]) -> list[float]:
    return vector.tolist()


def _base64(vector: array[float]) -> str:
    """Of little-endian float32, whatever this machine's order."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return b64encode(vector.tobytes()).decode()


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / lengths if lengths else 0.0


def _texts(fields: Fields, name: str, most: int) -> tuple[str, ...]:
    given, at = fields.value(name), fields.at(name)
    if isinstance(given, str):
        return (_text(given, at),)
    if not isinstance(given, list):
        raise mismatch(at, given, "string", "array")
    _check_count(at, given, most)
    return tuple(_text(it, f"{at}/{n}") for n, it in enumerate(given))


def _query_and_contexts(fields: Fields) -> tuple[str, ...]:
    fields.need("query", "contexts")
    contexts, at = fields.array("contexts") or [], fields.at("contexts")
    _check_count(at, contexts, MOST_TEXTS - 1)
    texts = []
    for n, it in enumerate(contexts):
        context = as_fields(f"{at}/{n}", it)
        context.need("text")
        texts.append(_text(context.value("text"), context.at("text")))
    return (_text(fields.value("query"), fields.at("query")), *texts)


def _text(given: Any, at: str) -> str:
    if not isinstance(given, str):
        raise mismatch(at, given, "string")
    if not given:
        raise BadField(at, f"Length of '{at}' must be >= 1, got 0")
    return given


def _ids_of_all(given: list[Any]) -> tuple[tuple[int, ...], ...]:
    if not isinstance(given[0], list):
        return (_ids(given, "/input"),)
    _check_count("/input", given, MOST_INPUTS)
    return tuple(_ids(it, f"/input/{n}") for n, it in enumerate(given))


def _ids(given: Any, at: str) -> tuple[int, ...]:
    if not isinstance(given, list):
        raise mismatch(at, given, "array")
    if not given:
        raise BadField(at, f"'{at}' must have >= 1 items, got 0")
    for n, it in enumerate(given):
        if type(it) is not int:
            raise mismatch(f"{at}/{n}", it, "integer")
        if not 0 <= it <= _MOST_ID:
            raise BadField(f"{at}/{n}", f"'{at}/{n}' must be a token's id")
    return tuple(given)


def _check_count(at: str, given: list[Any], most: int) -> None:
    if not 1 <= len(given) <= most:
        raise BadField(at, f"'{at}' must have 1 to {most} items, got {len(given)}")


def _pooling(fields: Fields) -> Pooling | None:
    return cast("Pooling | None", _one_of(fields, "pooling", ("mean", "cls")))


def _one_of(fields: Fields, name: str, allowed: tuple[str, ...]) -> str | None:
    given = fields.text(name)
    if given is not None and given not in allowed:
        says = f"'{fields.at(name)}' must be one of {', '.join(allowed)}"
        raise BadField(fields.at(name), says)
    return given
