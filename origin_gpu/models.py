"""What a worker reads of its model's folder: what turns text into ids and back. No weights here."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct, field

from routing import wire

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")

T = TypeVar("T")


class FolderError(ValueError):
    """A model folder lacks something, or has it wrong. Names the file and the field."""


class _Named(Struct):
    """One of several chat templates."""

    name: str
    template: str


class _Token(Struct):
    """A special token with its options, of which only the text matters."""

    content: str


class _TokenizerConfig(Struct):
    chat_template: str | list[_Named] | None = None
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    sep_token: str | _Token | None = None
    cls_token: str | _Token | None = None


class _Config(Struct):
    eos_token_id: int | list[int] | None = None


class _GenerationConfig(Struct):
    eos_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class _AddedToken(Struct):
    id: int
    content: str


class _Tokenizer(Struct):
    added_tokens: list[_AddedToken] = field(default_factory=list)


def read_assets(folder: Path) -> wire.TextAssets:
    """Tokenizer, chat template, stop ids and advised sampling of the model in `folder`.

    Raises FolderError.
    """
    tokenizer_json = _read(folder / "tokenizer.json")
    tokenizer = _parse(folder / "tokenizer.json", tokenizer_json, _Tokenizer)
    named = _load(folder / "tokenizer_config.json", _TokenizerConfig)
    config = _load(folder / "config.json", _Config)
    generation = _GenerationConfig()
    if (folder / "generation_config.json").exists():
        generation = _load(folder / "generation_config.json", _GenerationConfig)
    special = {name: _text(getattr(named, name)) for name in _SPECIAL}
    eos = [token.id for token in tokenizer.added_tokens if token.content == special["eos_token"]]
    stop_ids = {*_ids(generation.eos_token_id), *_ids(config.eos_token_id), *eos}
    return wire.TextAssets(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, named),
        special_tokens={name: text for name, text in special.items() if text is not None},
        stop_ids=tuple(sorted(stop_ids)),
        generation_defaults=_defaults(generation),
    )


def _chat_template(folder: Path, named: _TokenizerConfig) -> str:
    """From a file of its own, as newer models have it, or from the tokenizer's configuration.

    Empty for a model that was never taught to chat.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return _read(file).decode()
        except UnicodeDecodeError as exc:
            raise FolderError(f"{file}: {exc}") from exc
    if isinstance(named.chat_template, list):
        by_name = {it.name: it.template for it in named.chat_template}
        return by_name.get("default", "")
    return named.chat_template or ""


def _defaults(generation: _GenerationConfig) -> dict[str, float]:
    """What the model's makers advise, read as transformers does: only where they sample at all."""
    if not generation.do_sample:
        return {}
    advised = {name: getattr(generation, name) for name in _DEFAULTS}
    return {name: value for name, value in advised.items() if value is not None}


def _ids(found: int | list[int] | None) -> list[int]:
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _text(token: str | _Token | None) -> str | None:
    return token.content if isinstance(token, _Token) else token


def _load(path: Path, kind: type[T]) -> T:
    return _parse(path, _read(path), kind)


def _parse(path: Path, content: bytes, kind: type[T]) -> T:
    """Fields that `kind` does not have are skipped, and cost next to nothing."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise FolderError(f"{path}: {exc}") from exc


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise FolderError(f"{path} cannot be read: {exc.strerror}") from exc
