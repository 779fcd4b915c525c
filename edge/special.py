"""Keep clients' text from becoming special tokens. Pure; knows tokens' names, not their meaning.

In the tokenizer that is made here every special token goes by a secret name of this process, so
that `<|im_end|>` in any text is spelled out like other text. A chat template writes special tokens
too, by their public names, into the same text as the client's words. So the words are marked before
rendering, where they hold such a name; after it, the names without a mark are the template's and
are replaced by the secret ones.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_PRIVATE_USE = range(0xE000, 0xF900)  # characters of no script: no normaliser changes them
_MARKS = [chr(code) for code in range(0xF0000, 0xF0100)]  # of another private plane


class SpecialTokens:
    """The special tokens of one decoded tokenizer.json."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        special = [added for added in spec["added_tokens"] if added["special"]]
        self.ids = frozenset(added["id"] for added in special)
        # One character cannot be marked; none is known to be a special token.
        names = [added["content"] for added in special if len(added["content"]) > 1]
        secret = "".join(chr(secrets.choice(_PRIVATE_USE)) for _ in range(6))
        base = len(_PRIVATE_USE)
        self._secret_names = {
            name: secret + chr(_PRIVATE_USE[at // base]) + chr(_PRIVATE_USE[at % base])
            for at, name in enumerate(names)
        }
        self.secret_ids = {
            self._secret_names[added["content"]]: int(added["id"])
            for added in special
            if added["content"] in self._secret_names
        }
        # Longest first, as the tokenizer itself prefers.
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        self._name = re.compile(either)
        self._start = re.compile(f"(?=(?:{either}))(.)", re.DOTALL)

    def hide(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The tokenizer.json with the secret names in place of the public ones."""
        secret = self._secret_names
        added = [
            one | {"content": secret.get(one["content"], one["content"])}
            for one in spec["added_tokens"]
        ]
        model = dict(spec["model"])
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {secret.get(token, token): at for token, at in vocab.items()}
        else:  # Unigram: [token, score] by id
            model["vocab"] = [[secret.get(token, token), score] for token, score in vocab]
        if (unknown := model.get("unk_token")) in secret:
            model["unk_token"] = secret[unknown]
        return dict(spec) | {"added_tokens": added, "model": model}

    def mark(self, value: _T) -> tuple[_T, str]:
        """`value` (plain data) with every special token's name in its texts broken by a mark.

        The mark comes back; "" when there was nothing to mark, which is the rule.
        """
        texts = list(strings(value))
        if not any(self._name.search(text) for text in texts):
            return value, ""
        mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), _MARKS[0])
        return self._marked(value, mark), mark

    def name(self, rendered: str, mark: str) -> str:
        """A rendered text as the secretive tokenizer reads it: unmarked names are secret ones."""
        text = self._name.sub(lambda found: self._secret_names[found[0]], rendered)
        return text.replace(mark, "") if mark else text

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._start.sub(rf"\1{mark}", value)  # every start: names may overlap
        if isinstance(value, Mapping):
            items = value.items()
            return {self._marked(key, mark): self._marked(one, mark) for key, one in items}
        if isinstance(value, list | tuple):
            return [self._marked(one, mark) for one in value]
        return value


def strings(value: Any) -> Iterator[str]:
    """Every text in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)
