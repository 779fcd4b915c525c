"""Whether a request can ever run on an engine, and if not, why. Pure; knows no queue."""

from __future__ import annotations

from collections.abc import Sequence

from infire.notes import Hello
from routing import wire
from routing.errors import Code, Failure


def check_fits(request: wire.Generate, hello: Hello) -> None:
    """Failure(BAD_INPUT) for what the engine that said `hello` would refuse, or does not offer."""
    if hello.task != "text-generation":
        raise _bad(f"model: {request.model} makes vectors, and no text")
    if request.adapter is not None:
        raise _bad(f"lora: {request.model} has no adapter {request.adapter!r} here")
    if request.grammar is not None and not hello.grammars:
        raise _bad(f"response_format: {request.grammar.kind} is not offered here")
    _check_lengths(request, hello.max_sequence_tokens)
    sampling = request.sampling
    for field, ids in (
        ("prompt", request.token_ids),
        ("generated_ids", request.generated_ids),
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("stop_ids", sampling.stop_ids),
    ):
        _check_ids(field, ids, hello.vocab_size)


def check_texts(request: wire.Embed, hello: Hello) -> None:
    """The same of texts to make vectors of."""
    if hello.task != "text-embeddings":
        raise _bad(f"model: {request.model} makes text, and no vectors")
    if not request.texts:
        raise _bad("text: there is none")
    for n, ids in enumerate(request.texts):
        if not ids:
            raise _bad(f"text {n}: it has no tokens")
        if len(ids) > hello.max_sequence_tokens:
            detail = f"text {n}: its {len(ids)} tokens exceed the {hello.max_sequence_tokens}"
            raise _bad(f"{detail} that one text may have")
        _check_ids(f"text {n}", ids, hello.vocab_size)


def _check_lengths(request: wire.Generate, longest: int) -> None:
    num_prompt, num_generated = len(request.token_ids), len(request.generated_ids)
    max_tokens = request.sampling.max_tokens
    if not num_prompt:
        raise _bad("prompt: it has no tokens")
    if max_tokens <= num_generated:
        raise _bad(f"max_tokens: {max_tokens}, where {num_generated} tokens are there already")
    if num_prompt + num_generated >= longest:
        known = f"{num_prompt} tokens"
        if num_generated:
            known += f", and {num_generated} of the answer,"
        raise _bad(f"prompt: {known} leave no room in the {longest} that one request may have")


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(it for it in ids if not 0 <= it < vocab_size)
        raise _bad(f"{field}: {wrong} is no token of a vocabulary of {vocab_size}")


def _bad(detail: str) -> Failure:
    return Failure(Code.BAD_INPUT, detail)
