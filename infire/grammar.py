"""What an output must match, compiled to what token masks come from. Knows no slot and no logits.

llguidance compiles and matches (https://github.com/guidance-ai/llguidance); the limits are set so
that no mask takes long. That compiling does not is for `infire.grammar_check` to see.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import msgspec
from llguidance import LLMatcher, LLParserLimits

from infire.request import Grammar
from infire.vocabulary import BadVocabulary, Vocabulary, read_vocabulary

_logger = logging.getLogger(__name__)

MOST_SOURCE_BYTES = 64 << 10
_KEPT = 64  # templates, besides those in use
_KEPT_FAULTS = 256

# Between any two tokens of JSON, where none would do. Without an end a small model may go on with
# spaces for ever; this lets lists be indented some levels deep.
_SPACE = r"[ \n]{1,16}"
# Of llguidance's defaults half and less: with those, a mask of a hostile grammar takes a second,
# now 0.1 s. What is left is enough for a choice of thousands of texts, or of a thousand objects.
_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_lexer_states=20_000,  # 1 to 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)


class BadGrammar(ValueError):
    """A grammar that cannot be used. Says why, for whoever wrote it."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Template:
    """A compiled grammar at its beginning."""

    grammar: Grammar
    _matcher: LLMatcher

    def matcher(self) -> LLMatcher:
        """One of its own for a sequence; what any of them learns of the grammar serves all."""
        return self._matcher.deep_copy()


class Templates:
    """The grammars that are in use, and those used last. Any thread may ask."""

    def __init__(self, vocabulary: Vocabulary, *, kept: int = _KEPT) -> None:
        self.vocabulary = vocabulary
        self._kept: OrderedDict[Grammar, Template] = OrderedDict()  # last used last
        self._alive: WeakValueDictionary[Grammar, Template] = WeakValueDictionary()
        self._faults: OrderedDict[Grammar, str] = OrderedDict()
        self._most = kept
        self._lock = Lock()

    def known(self, grammar: Grammar) -> Template | None:
        """The template, if it was compiled before."""
        with self._lock:
            template = self._alive.get(grammar)
            if template is not None:
                self._keep(template)
            return template

    def get(self, grammar: Grammar) -> Template:
        """The template, compiled if need be: Python goes on meanwhile. Raises `BadGrammar`."""
        if (template := self.known(grammar)) is not None:
            return template
        if fault := self.fault(grammar):
            raise BadGrammar(fault)
        template = Template(grammar, compiled(grammar, self.vocabulary))
        with self._lock:
            self._alive[grammar] = template
            self._keep(template)
        return template

    def renew(self, template: Template) -> Template:
        """One whose tables are empty, for all who ask from now on. Raises `BadGrammar`."""
        with self._lock:
            if self._alive.get(template.grammar) is template:
                self._forget(template.grammar)
        return self.get(template.grammar)

    def fault(self, grammar: Grammar) -> str:
        """What was found wrong with it before; "" for nothing."""
        return self._faults.get(grammar, "")

    def blame(self, grammar: Grammar, fault: str) -> None:
        """Whoever asks from now on is told what is wrong with it."""
        with self._lock:
            self._faults[grammar] = fault
            if len(self._faults) > _KEPT_FAULTS:
                self._faults.popitem(last=False)
            self._forget(grammar)

    def _forget(self, grammar: Grammar) -> None:
        self._kept.pop(grammar, None)
        self._alive.pop(grammar, None)

    def _keep(self, template: Template) -> None:
        self._kept[template.grammar] = template
        self._kept.move_to_end(template.grammar)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def read_templates(folder: Path, vocab_size: int) -> Templates | None:
    """Of grammars for the model in `folder`. None, and a warning, where there can be none."""
    try:
        return Templates(read_vocabulary(folder, vocab_size))
    except BadVocabulary as error:
        _logger.warning("grammars are not offered: %s", error)
        return None


def compiled(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher that has made its first mask, which is where much of the work is done.

    Raises `BadGrammar`.
    """
    if len(grammar.source.encode()) > MOST_SOURCE_BYTES:
        raise BadGrammar(f"more than {MOST_SOURCE_BYTES} bytes")
    matcher = LLMatcher(vocabulary.tokenizer, _in_lark(grammar), log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error() or not (matcher.is_accepting() or not matcher.is_stopped()):
        raise BadGrammar(said(matcher))
    return matcher


def said(matcher: LLMatcher) -> str:
    """What is wrong, in a line."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if "NoExtension" in text or not text:
        return "nothing can match it"
    return text.partition("\n   1 | ")[0].replace("\n", " ")[:500]


def _in_lark(grammar: Grammar) -> str:
    """In llguidance's own notation. Raises `BadGrammar`."""
    match grammar.kind:
        case "json_object":
            return _of_schema('{"type": "object"}')
        case "json_schema":
            return _of_schema(grammar.source)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            return LLMatcher.grammar_from_lark(_of_choice(grammar.source))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


def _of_schema(source: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            source,
            overrides={"whitespace_pattern": _SPACE, "lenient": False, "coerce_one_of": False},
        )
    except ValueError as error:
        raise BadGrammar(str(error)) from error


def _of_choice(source: str) -> str:
    """One terminal, of which each text is an alternative."""
    try:
        texts = msgspec.json.decode(source, type=list[str])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadGrammar(f"not an array of texts: {error}") from None
    if not texts:
        raise BadGrammar("no choice")
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts)
