"""Token ids into text, as they come: which bytes each id stands for, and whole characters of them.

Reads the `decoder` of a Hugging Face tokenizer file; knows no model and no request.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """What a decoder does to tokens, in the order it does it."""

    byte_level: bool = False  # GPT-2's alphabet: a character stands for a byte
    byte_fallback: bool = False  # `<0x0A>` stands for a byte
    replaced: tuple[tuple[str, str], ...] = ()
    dropped_at_start: str = ""  # Metaspace: left out of the first token altogether
    stripped: tuple[str, int] = ("", 0)  # Strip: this character, at most so often, off the start


class Spelling:
    """id -> bytes. Hidden ids (special tokens, ends of text) and unknown ones spell nothing."""

    def __init__(self, spec: Mapping[str, Any], hidden: Collection[int]) -> None:
        """`spec`: a decoded tokenizer.json. ValueError when its decoder is of no known kind."""
        steps = _steps(spec.get("decoder"))
        tokens = vocabulary(spec)
        self.bytes_of = {
            token_id: _spelled(token, steps)
            for token, token_id in tokens.items()
            if token_id not in hidden
        }
        self._hidden = {at: token for token, at in tokens.items() if at in hidden}
        self.first_of: dict[int, bytes] = {}  # where a first token is spelled otherwise
        if mark := steps.dropped_at_start:
            self.first_of = {
                token_id: _spelled(token.replace(mark, ""), steps)
                for token, token_id in tokens.items()
                if mark in token and token_id not in hidden
            }
        self.stripped = steps.stripped
        # Ids that were seen to spell whole characters, and which: most do. Filled by streams.
        self.whole: dict[int, str] = {}

    def showing(self, names: Mapping[int, str]) -> Spelling:
        """The same, but that these ids spell these texts."""
        other = copy(self)
        other.bytes_of = self.bytes_of | {at: name.encode() for at, name in names.items()}
        other.whole = {}
        return other

    def text(self, token_id: int) -> str:
        """One token by itself, hidden ones by name. Bytes that are no whole character become lone
        surrogates (PEP 383), so that the bytes can be had back; JSON cannot hold them."""
        if token_id in self._hidden:
            return self._hidden[token_id]
        return self.bytes_of.get(token_id, b"").decode("utf-8", "surrogateescape")


class TextStream:
    """The text of one answer. A character whose bytes are not all there yet is held back.

    What a model leaves unfinished at its end is no text, and is never shown.
    """

    __slots__ = ("_begun", "_bytes_of", "_held", "_spelling", "_whole")

    def __init__(self, spelling: Spelling, *, begun: bool = False) -> None:
        """`begun`: there is text before it, so its first word is spelled as any other."""
        self._spelling = spelling
        self._bytes_of = spelling.bytes_of.get
        self._whole = spelling.whole.get
        self._held = b""  # the beginning of a character
        self._begun = begun

    def push(self, ids: Sequence[int]) -> str:
        """The whole characters that `ids` complete."""
        if len(ids) == 1 and self._begun and not self._held:
            text = self._whole(ids[0])
            return self._read(ids[0]) if text is None else text
        if not self._begun:
            return self._begin(ids)
        return self._decode(b"".join([self._bytes_of(token_id, b"") for token_id in ids]))

    def _read(self, token_id: int) -> str:
        """The text of one id where nothing is held; remembered if it is text by itself."""
        spelled = self._bytes_of(token_id, b"")
        text = self._decode(spelled)
        if spelled and text.encode() == spelled:
            self._spelling.whole[token_id] = text
        return text

    def _decode(self, data: bytes) -> str:
        """Bytes that can be no text become U+FFFD."""
        data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def _begin(self, ids: Sequence[int]) -> str:
        """Until something is spelled: SentencePiece writes a space before the first word."""
        spelled = [self._bytes_of(token_id, b"") for token_id in ids]
        at = next((at for at, token_id in enumerate(ids) if self._bytes_of(token_id)), None)
        if at is None:
            return ""
        self._begun = True
        spelled[at] = self._spelling.first_of.get(ids[at], spelled[at])
        character, most = self._spelling.stripped
        data = b"".join(spelled)
        for _ in range(most):
            data = data.removeprefix(character.encode())
        return self._decode(data)


def vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, of a decoded tokenizer.json, added tokens included."""
    vocab = spec["model"]["vocab"]
    listed: Iterable[tuple[str, int]] = (
        vocab.items()
        if isinstance(vocab, dict)
        else ((piece, token_id) for token_id, (piece, _) in enumerate(vocab))  # Unigram
    )
    return dict(listed) | {added["content"]: added["id"] for added in spec["added_tokens"]}


def _spelled(token: str, steps: _Steps) -> bytes:
    if steps.byte_fallback and (byte := _BYTE.fullmatch(token)):
        return bytes.fromhex(byte[1])
    for old, new in steps.replaced:
        token = token.replace(old, new)
    if steps.byte_level and all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


def _steps(decoder: Mapping[str, Any] | None) -> _Steps:
    """The decoder's parts as one value; ValueError for a part whose effect is not known here."""
    found: dict[str, Any] = {"replaced": ()}
    for part in _parts(decoder):
        match part:
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse" as kind}:
                found |= _SIMPLE[kind]
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                found["replaced"] += ((old, new),)
            case {"type": "Strip", "content": str(character), "start": int(most), "stop": 0}:
                found["stripped"] = (character, most)
            case {"type": "Metaspace", "replacement": str(mark)}:
                found["replaced"] += ((mark, " "),)
                found["dropped_at_start"] = "" if _never_prepended(part) else mark
            case _:
                raise ValueError(f"the tokenizer's decoder is of no known kind: {part}")
    return _Steps(**found)


_SIMPLE: Mapping[str, dict[str, Any]] = {
    "ByteLevel": {"byte_level": True},
    "ByteFallback": {"byte_fallback": True},
    "Fuse": {},  # joins what a stream joins anyway
}


def _never_prepended(metaspace: Mapping[str, Any]) -> bool:
    """Whether no space was put before the first word; older files say so by another field."""
    if metaspace.get("add_prefix_space") is False:
        return True
    return bool(metaspace.get("prepend_scheme") == "never")


def _parts(decoder: Mapping[str, Any] | None) -> list[Any]:
    if decoder is None:
        return [None]
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder["decoders"] for part in _parts(inner)]
    return [decoder]


def _alphabet() -> dict[str, int]:
    """Character -> byte. GPT-2 spells printable bytes as themselves and the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_ALPHABET = _alphabet()
