"""Where deciding and computing meet: submit, drop, export, step. Knows no socket and no tensor."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from infire.admission import Refusal
from infire.notes import (
    Adopted,
    Answer,
    Drop,
    Export,
    Exported,
    Gauges,
    Note,
    Refused,
    Results,
    Submit,
)
from infire.plan import Runner
from infire.request import Sequence, Step
from infire.scheduler import Adoption, Scheduler


class Engine:
    """Acts (`submit`, `drop`, `export`) between steps; their answers leave with the next results.

    An error out of `step` is a bug or a broken device: the engine is of no more use.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._kv_paths: dict[str, str] = {}  # of requests that wait for blocks to adopt into
        self._answers: list[Answer] = []
        self._step_s = 0.0

    def do(self, note: Note) -> None:
        match note:
            case Submit():
                self.submit(note.sequence, note.kv_path, note.num_adopted)
            case Drop():
                self.drop(note.request_id)
            case Export():
                self.export(note.request_id, note.path)

    def submit(self, sequence: Sequence, kv_path: str | None = None, num_adopted: int = 0) -> None:
        """Run `sequence`, with the KV of its first `num_adopted` tokens read from `kv_path`.

        Answers `Refused` if it can never run, `Adopted` once the file has been read.
        """
        try:
            if (kv_path is None) != (num_adopted == 0):
                raise Refusal("bad_input", f"KV of {num_adopted} tokens in file {kv_path}")
            self._scheduler.add(sequence, num_adopted)
        except Refusal as refusal:
            self._refuse(sequence.request_id, refusal.code, refusal.detail)
            return
        if kv_path is not None:
            self._kv_paths[sequence.request_id] = kv_path

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored. Nothing more is said of it."""
        self._kv_paths.pop(request_id, None)
        self._scheduler.drop(request_id)

    def export(self, request_id: str, path: str) -> None:
        """Write the KV of a held sequence to a new file. Answers `Exported`.

        Answers `Refused` (lost) when the file cannot be written; the hold has then ended.
        """
        seq = self._scheduler.held(request_id)
        if seq is None:
            self._answers.append(Exported(request_id, None))
            return
        try:
            num_bytes = self._runner.export(seq.block_ids, seq.num_computed, path)
        except OSError as error:
            self.drop(request_id)
            self._refuse(request_id, "lost", f"KV cannot be written: {error}")
        else:
            self._answers.append(Exported(request_id, num_bytes))

    def step(self) -> Results | None:
        """Make one step. None when there was nothing to compute and nothing to answer."""
        began = self._clock()
        for adoption in self._scheduler.place():
            self._adopt(adoption)
        plan = self._scheduler.plan()
        steps: list[Step] = []
        if plan:
            steps = self._scheduler.commit(plan, self._runner.run(plan))
            for request_id in self._scheduler.take_lost():
                self._refuse(request_id, "lost", "a KV block of it was handed out again")
            self._step_s = self._clock() - began
            self._scheduler.took(plan, self._step_s)
        elif not self._answers:
            return None
        answers, self._answers = tuple(self._answers), []
        return Results(self.gauges(), tuple(steps), answers, *self._scheduler.take_cache_news())

    def gauges(self) -> Gauges:
        return self._scheduler.gauges(self._step_s)

    def _adopt(self, adoption: Adoption) -> None:
        request_id = adoption.request_id
        path = self._kv_paths.pop(request_id)
        try:
            self._runner.adopt(adoption.block_ids, adoption.num_tokens, path)
        except ValueError as error:
            self._scheduler.drop(request_id)
            self._refuse(request_id, "incompatible", f"KV cannot be adopted: {error}")
        except OSError as error:
            self._scheduler.drop(request_id)
            self._refuse(request_id, "lost", f"KV cannot be read: {error}")
        else:
            self._answers.append(Adopted(request_id))

    def _refuse(self, request_id: str, code: str, detail: str) -> None:
        self._answers.append(Refused(request_id, code, detail))
