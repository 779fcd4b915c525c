"""Grammars on their way into an engine: checked, compiled, and found to fit what was said so far.

All of it in threads, and most of that in child processes: no step waits. What was found of a
grammar is kept, good or bad.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from threading import Condition, Thread

import numpy as np

from infire.grammar import MOST_SOURCE_BYTES, BadGrammar, Template, Templates
from infire.grammar_check import CannotCheck, Checker
from infire.grammar_queue import GrammarQueue
from infire.masks import ends_of, is_complete
from infire.request import Grammar, Sequence

LANES = 2  # grammars checked at a time

# What a refusal calls it. An edge says which of the client's fields it was.
FIELD = "/grammar"


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

    def __init__(self, templates: Templates, checkers: Seq[Checker]) -> None:
        """`checkers`: one for each grammar that is checked at a time."""
        self._templates = templates
        self._checkers = checkers
        self._ends = ends_of(templates)
        self._asked = GrammarQueue(len(checkers))
        self._changed = Condition()  # of what is asked
        self._closed = False
        self._ready: deque[Ready] = deque()
        self._threads: list[Thread] = []
        self._num_idle = 0

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
        with self._changed:
            self._asked.put(sequence)
            # Idle ones may have been woken for others, and not have come to it yet.
            if len(self._asked) > self._num_idle and len(self._threads) < len(self._checkers):
                self._start(self._checkers[len(self._threads)])
            self._changed.notify()

    def drop(self, request_id: str) -> None:
        """Check nothing for it, if that has not begun; `take_ready` may still tell of it."""
        with self._changed:
            self._asked.drop(request_id)

    def take_ready(self) -> list[Ready]:
        found = []
        while self._ready:
            found.append(self._ready.popleft())
        return found

    def close(self) -> None:
        """End the threads and their children, at once where they have nothing to do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1.0)

    def _start(self, checker: Checker) -> None:
        thread = Thread(target=self._work, args=(checker,), name="grammars", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, checker: Checker) -> None:
        while (sequence := self._next()) is not None:
            self._ready.append(self._make(sequence, checker))
            with self._changed:
                self._asked.done(sequence)
                self._changed.notify_all()  # what waited for that grammar, or for its tenant
            checker.warm()
        checker.close()

    def _next(self) -> Sequence | None:
        """What is to be checked next; None at the end."""
        with self._changed:
            self._num_idle += 1
            while not self._closed and (sequence := self._asked.take()) is None:
                self._changed.wait()
            self._num_idle -= 1
            return None if self._closed else sequence

    def _make(self, sequence: Sequence, checker: Checker) -> Ready:
        grammar = sequence.grammar
        assert grammar is not None
        try:
            template = self._templates.known(grammar) or self._compile(grammar, checker)
            complete = self._replay(template, sequence)
        except CannotCheck as error:
            detail = f"grammars cannot be checked: {error}"
            return Ready(request_id=sequence.request_id, code="unavailable", detail=detail)
        except BadGrammar as error:
            return _bad(sequence, str(error))
        return Ready(request_id=sequence.request_id, template=template, complete=complete)

    def _compile(self, grammar: Grammar, checker: Checker) -> Template:
        fault = self._templates.fault(grammar) or checker.check(grammar)
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
    detail = f"AiError: Bad input: Error: '{FIELD}': {fault}"
    return Ready(request_id=sequence.request_id, detail=detail)
