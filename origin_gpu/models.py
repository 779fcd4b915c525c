"""What a worker reads of its model's folder: what turns text into ids and back. No weights here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from routing import wire

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class FolderError(ValueError):
    """A model folder lacks something, or has it wrong. Names the file and the field."""


def read_assets(folder: Path) -> wire.TextAssets:
    """Tokenizer, chat template, stop ids and advised sampling of the model in `folder`.

    Raises FolderError.
    """
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json", missing={})
    config = _read_json(folder / "config.json")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise FolderError(f"{tokenizer} is missing")
    special = {name: _token_text(tokenizer_config.get(name)) for name in _SPECIAL}
    return wire.TextAssets(
        tokenizer_json=tokenizer.read_bytes(),
        chat_template=_chat_template(folder, tokenizer_config),
        special_tokens={name: text for name, text in special.items() if text is not None},
        stop_ids=_stop_ids(folder, config, generation),
        generation_defaults={
            name: float(generation[name])
            for name in _DEFAULTS
            # written by the model's makers, but meant only where they sample at all
            if generation.get(name) is not None and generation.get("do_sample", True)
        },
    )


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """From a file of its own, as newer models have it, or from the tokenizer's configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template", "")
    if isinstance(template, list):  # several by name
        template = {it["name"]: it["template"] for it in template}.get("default", "")
    if not isinstance(template, str):
        raise FolderError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _stop_ids(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    """What ends an answer: the generation's end ids, which may be more than the model's one."""
    for name, source in (("generation_config.json", generation), ("config.json", config)):
        found = source.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(it, int) for it in ids):
            raise FolderError(f"{folder / name}: eos_token_id is {found!r}, not a number or list")
        return tuple(ids)
    return ()


def _token_text(token: Any) -> str | None:
    """A special token is text, or a table with the text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise FolderError(f"{path} is missing") from None
    except ValueError as error:
        raise FolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise FolderError(f"{path} holds no table")
    return found
