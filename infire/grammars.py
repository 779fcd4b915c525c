"""Grammars on their way into an engine: checked, compiled, and found to fit what was said so far.

All of it in a thread, and most of that in a child process: no step waits. What was found of a
grammar is kept, good or bad.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

import numpy as np

from infire.grammar import MOST_SOURCE_BYTES, BadGrammar, Template, Templates
from infire.grammar_check import CannotCheck, Checker
from infire.masks import ends_of, is_complete
from infire.request import Grammar, Sequence

# What clients call it. An edge may know better: it sees the request.
FIELDS = {
    "json_object": "/response_format",
    "json_schema": "/response_format/json_schema",
    "regex": "/guided_regex",
    "choice": "/guided_choice",
    "lark": "/guided_grammar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What became of one sequence's grammar."""

    request_id: str
    template: Template | None = None  # None: the sequence cannot be run
    code: str = "bad_input"  # why not: a label of `routing.errors.Code`
    detail: str = ""
    complete: bool = False  # its output is whole already, and no id would say so


class Grammars:
    """What a step loop gives grammars to, and takes them back from. Never waits."""

    def __init__(self, templates: Templates, checker: Checker) -> None:
        self._templates = templates
        self._checker = checker
        self._ends = ends_of(templates)
        self._asked: SimpleQueue[Sequence | None] = SimpleQueue()
        self._ready: deque[Ready] = deque()
        self._thread: Thread | None = None

    def want(self, sequence: Sequence) -> None:
        """Have the grammar of `sequence` made ready: `take_ready` will tell, perhaps at once."""
        assert sequence.grammar is not None
        fault = _too_long(sequence.grammar) or self._templates.fault(sequence.grammar)
        if fault:
            self._ready.append(_bad(sequence, fault))
            return
        template = self._templates.known(sequence.grammar)
        if template is not None and not sequence.num_output:
            self._ready.append(Ready(request_id=sequence.request_id, template=template))
            return
        if self._thread is None:
            self._thread = Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()
        self._asked.put(sequence)

    def take_ready(self) -> list[Ready]:
        found = []
        while self._ready:
            found.append(self._ready.popleft())
        return found

    def close(self) -> None:
        """End the thread and its child, at once where it has nothing to do."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(1.0)

    def _work(self) -> None:
        while (sequence := self._asked.get()) is not None:
            self._ready.append(self._make(sequence))
        self._checker.close()

    def _make(self, sequence: Sequence) -> Ready:
        grammar = sequence.grammar
        assert grammar is not None
        try:
            template = self._templates.known(grammar) or self._compile(grammar)
            complete = self._replay(template, sequence)
        except CannotCheck as error:
            detail = f"grammars cannot be checked: {error}"
            return Ready(request_id=sequence.request_id, code="unavailable", detail=detail)
        except BadGrammar as error:
            return _bad(sequence, str(error))
        return Ready(request_id=sequence.request_id, template=template, complete=complete)

    def _compile(self, grammar: Grammar) -> Template:
        fault = self._templates.fault(grammar) or self._checker.check(grammar)
        if fault:
            self._templates.blame(grammar, fault)
        return self._templates.get(grammar)

    def _replay(self, template: Template, sequence: Sequence) -> bool:
        """Whether the output so far is all there can be. `BadGrammar` if it does not match."""
        output = sequence.token_ids[sequence.num_prompt :]
        if not output:
            return False
        matcher = template.matcher()
        if not matcher.consume_tokens(output):
            raise BadGrammar("the answer so far does not match it")
        if sequence.sampling.stop_ids:
            return False
        mask = np.zeros(self._templates.vocabulary.num_words, np.int32)
        return is_complete(matcher, mask, self._ends)


def _too_long(grammar: Grammar) -> str:
    if len(grammar.source) <= MOST_SOURCE_BYTES:  # bytes are counted where it is compiled
        return ""
    return f"it is longer than {MOST_SOURCE_BYTES} bytes"


def _bad(sequence: Sequence, fault: str) -> Ready:
    assert sequence.grammar is not None
    detail = f"AiError: Bad input: Error: '{FIELDS[sequence.grammar.kind]}': {fault}"
    return Ready(request_id=sequence.request_id, detail=detail)
