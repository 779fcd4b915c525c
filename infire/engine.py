"""Where deciding and computing meet: submit, drop, export, step. Knows no socket and no tensor."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import msgspec

from infire.admission import Refusal
from infire.grammar import Template
from infire.grammars import Grammars
from infire.notes import (
    Adopted,
    Answer,
    Drop,
    EmbedTexts,
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
from infire.tiers import Tiers

BLOCKS_A_REST = 16  # of the prefix cache that are written while there is nothing else to do
CLOSE_S = 1.0
PIECE_TOKENS = 256  # computed before one more piece of an export is written, but for the last


@dataclass(slots=True)
class _Export:
    """A file that KV is written to as it is computed."""

    path: str
    num_tokens: int = 0  # written


class Engine:
    """Acts (`submit`, `drop`, `export`) between steps; their answers leave with the next results.

    An error out of `step` is a bug or a broken device: the engine is of no more use.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        tiers: Tiers | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`tiers`: those that `scheduler` was given; `grammars`: with the templates of `runner`."""
        self._tiers = tiers
        self._grammars = grammars
        self._compiling: dict[str, Submit] = {}  # whose grammar is not ready yet
        self._templates: dict[str, Template] = {}  # of requests in here: kept, to start again with
        self._ended: list[Step] = []  # to be told: of requests that were whole when they came
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        # Of requests that wait for blocks to adopt into: the file, and the ends of its pieces.
        self._adopts: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._exports: dict[str, _Export] = {}
        self._answers: list[Answer] = []
        self._step_s = 0.0

    def do(self, note: Note) -> None:
        match note:
            case Submit():
                self._take(note)
            case Drop():
                self.drop(note.request_id)
            case EmbedTexts():
                self._refuse(note.request_id, "bad_input", "this model makes text, and no vectors")

    def submit(
        self,
        sequence: Sequence,
        kv_path: str | None = None,
        num_adopted: int = 0,
        *,
        piece_ends: tuple[int, ...] = (),
        export_path: str | None = None,
    ) -> None:
        """Run `sequence`, with the KV of its first `num_adopted` tokens read from `kv_path`.

        Answers `Refused` if it can never run, `Adopted` once the file has been read, `Exported`
        whenever more is in the file at `export_path`.
        """
        self._take(
            Submit(
                sequence=sequence,
                kv_path=kv_path,
                num_adopted=num_adopted,
                piece_ends=piece_ends,
                export_path=export_path,
            )
        )

    def _take(self, note: Submit) -> None:
        """Begin with it, or with its grammar, which must be ready first."""
        sequence = note.sequence
        if sequence.grammar is None:
            self._begin(note)
        elif self._grammars is None:
            self._refuse(sequence.request_id, "bad_input", "grammars are not offered here")
        else:
            self._compiling[sequence.request_id] = note
            self._grammars.want(sequence)

    def _begin(self, note: Submit) -> None:
        sequence, kv_path = note.sequence, note.kv_path
        try:
            if (kv_path is None) != (note.num_adopted == 0):
                raise Refusal("bad_input", f"KV of {note.num_adopted} tokens in file {kv_path}")
            self._scheduler.add(sequence, note.num_adopted)
        except Refusal as refusal:
            self._refuse(sequence.request_id, refusal.code, refusal.detail)
            return
        if kv_path is not None:
            self._adopts[sequence.request_id] = kv_path, note.piece_ends
        if note.export_path is not None:
            self._exports[sequence.request_id] = _Export(note.export_path)

    def _take_ready(self, grammars: Grammars) -> None:
        """Begin with those whose grammar is ready now."""
        for ready in grammars.take_ready():
            note = self._compiling.pop(ready.request_id, None)
            if note is None:  # dropped meanwhile
                continue
            if ready.template is None:
                self._refuse(ready.request_id, ready.code, ready.detail)
            elif ready.complete:
                self._end(note)
            else:
                self._templates[ready.request_id] = ready.template
                self._begin(note)

    def _end(self, note: Submit) -> None:
        """A request that has nothing more to say: its last worker died before it could say so."""
        request_id = note.sequence.request_id
        if note.kv_path is not None:
            self._answers.append(Adopted(request_id))
        self._ended.append(Step(request_id=request_id, ids=(), finish="stop"))

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored. Nothing more is said of it.

        Its export goes too: who dropped it may have looked for the file before it was made.
        """
        if self._compiling.pop(request_id, None) and self._grammars is not None:
            self._grammars.drop(request_id)
        self._templates.pop(request_id, None)
        self._adopts.pop(request_id, None)
        export = self._exports.pop(request_id, None)
        if export is not None and export.num_tokens:
            Path(export.path).unlink(missing_ok=True)
        self._scheduler.drop(request_id)

    def step(self) -> Results | None:
        """Make one step. None when there was nothing to compute and nothing to answer."""
        if self._grammars is not None and self._compiling:
            self._take_ready(self._grammars)
        self._write_out()
        if self._answers or self._ended:  # who waits for these waits for nothing that is computed
            ended, self._ended = self._ended, []
            return self._told(ended)
        began = self._clock()
        adoptions = self._scheduler.place()
        self._move_blocks()
        for adoption in adoptions:
            self._adopt(adoption)
        plan = self._scheduler.plan()
        self._move_blocks()
        steps: list[Step] = []
        if plan:
            steps = self._scheduler.commit(plan, self._runner.run(plan))
            self._step_s = self._clock() - began
            self._scheduler.took(plan, self._step_s)
        for request_id, fault in self._scheduler.take_lost():
            self._exports.pop(request_id, None)
            if fault:
                self._refuse(request_id, "bad_input", f"its grammar cannot be followed: {fault}")
            else:
                self._refuse(request_id, "lost", "a KV block of it was handed out again")
        if not plan and not self._answers:
            return None
        return self._told(steps)

    def _told(self, steps: Seq[Step]) -> Results:
        if self._templates:
            for step in steps:
                if step.finish is not None:
                    self._templates.pop(step.request_id, None)
        answers, self._answers = tuple(self._answers), []
        return Results(self.gauges(), tuple(steps), answers, *self._cache_news())

    def rest(self) -> bool:
        """Use a time without work: write some of what would be lost with this process. Whether
        there was something, or will be soon."""
        tiers = self._tiers
        if tiers is None or self._compiling:
            return bool(self._compiling)
        blocks = [it for it in self._scheduler.idle_blocks() if not tiers.is_kept(it[1])]
        for block, key in blocks[-BLOCKS_A_REST:]:  # what was used last first
            tiers.write(key, self._runner.save(block))
        return bool(blocks)

    def close(self) -> None:
        """Have what waits to be written in its files, as far as that takes no long time."""
        if self._grammars is not None:
            self._grammars.close()
        if self._tiers is not None:
            self._tiers.close(CLOSE_S)

    def gauges(self) -> Gauges:
        gauges = self._scheduler.gauges(self._step_s)
        if self._compiling:
            waiting = gauges.waiting + len(self._compiling)
            gauges = msgspec.structs.replace(gauges, waiting=waiting)
        if (tiers := self._tiers) is None:
            return gauges
        return msgspec.structs.replace(
            gauges,
            host_blocks=tiers.num_host,
            disk_blocks=tiers.num_disk,
            host_blocks_found=tiers.num_found["host"],
            disk_blocks_found=tiers.num_found["disk"],
        )

    def _move_blocks(self) -> None:
        """Before anything is written to blocks: what was evicted goes to the tiers, and what was
        found there to the device."""
        fills, unsaved = self._scheduler.take_fills(), self._scheduler.take_unsaved()
        if self._tiers is None:
            return
        not_loaded = {(block, key): content for block, key, content in fills}
        for block, key in unsaved:
            content = not_loaded.get((block, key))
            self._tiers.put(key, self._runner.save(block) if content is None else content)
        # Even where the key names another block by now; of a block filled twice the last counts.
        for block, _, content in fills:
            self._runner.load(block, content)

    def _cache_news(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys that came and went, of the device and the tiers behind it taken together."""
        came, went = self._scheduler.take_cache_news()
        if (tiers := self._tiers) is None:
            return came, went
        also, gone = tiers.take_news()
        lost = [key for key in went if not tiers.has(key)]
        lost += [key for key in gone if not self._scheduler.has_cached(key)]
        return (*came, *also), tuple(lost)

    def _write_out(self) -> None:
        """Write KV of the last step. Here and not there, for what it sampled goes out first."""
        for seq, held in self._scheduler.take_gained():
            export = self._exports.get(seq.request_id)
            if export is None:
                continue
            count = seq.num_computed - export.num_tokens
            if held or (count >= PIECE_TOKENS and not self._scheduler.forgets):
                self._export(seq, export)

    def _export(self, seq: Sequence, export: _Export) -> None:
        request_id, end = seq.request_id, seq.num_computed
        try:
            num_bytes = self._runner.export(seq.block_ids, end, export.path, export.num_tokens)
        except OSError as error:
            self.drop(request_id)
            self._refuse(request_id, "lost", f"KV cannot be written: {error}")
        else:
            export.num_tokens = end
            self._answers.append(Exported(request_id, num_bytes, end))

    def _adopt(self, adoption: Adoption) -> None:
        request_id = adoption.request_id
        path, piece_ends = self._adopts.pop(request_id)
        try:
            self._runner.adopt(adoption.block_ids, adoption.num_tokens, path, piece_ends)
        except ValueError as error:
            self.drop(request_id)
            self._refuse(request_id, "incompatible", f"KV cannot be adopted: {error}")
        except OSError as error:
            self.drop(request_id)
            self._refuse(request_id, "lost", f"KV cannot be read: {error}")
        else:
            self._answers.append(Adopted(request_id))

    def _refuse(self, request_id: str, code: str, detail: str) -> None:
        self._templates.pop(request_id, None)
        self._answers.append(Refused(request_id, code, detail))
