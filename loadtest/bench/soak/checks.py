"""What must be so after a soak: answers, usage, and whether each exception has its fault. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.bench.soak.clients import Answered
from loadtest.bench.soak.faults import Fault
from loadtest.bench.table import markdown
from routing.reconcile import Finding, Missing, Short
from routing.usage import LedgerRow

# Between a fault and what a clock at the other end says of it; also how long a row may wait to be
# written by a process that had no time for it.
SLACK_S = 2.0
_SHOWN = 5  # exceptions of a kind


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    problems: Sequence[str]
    seen: str = ""  # what was looked at, in words


class Deaths:
    """When which process was killed, and which slept."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        faults = list(faults)
        self._kills = [fault for fault in faults if fault.what == "kill"]
        self._pauses = [fault for fault in faults if fault.what == "pause"]

    def killed(self, kind: str, begin: float, end: float, name: str | None = None) -> bool:
        """Whether a process of this kind was, in this time or about it."""
        return any(
            kill.kind == kind and name in {None, kill.name}
            for kill in self._kills
            if begin - SLACK_S <= kill.at <= end + SLACK_S
        )

    def asleep_since(self, kind: str, at: float) -> float:
        """When a process of this kind began a pause that it had just ended, if one had; else `at`.
        What it then says has begun, and ended, came to it before."""
        pauses = [pause for pause in self._pauses if pause.kind == kind and pause.at <= at]
        recent = [pause.at for pause in pauses if at <= pause.at + pause.length_s + SLACK_S]
        return min(recent, default=at)

    def num(self, *, engines: bool) -> int:
        return sum((kill.kind == "engine") == engines for kill in self._kills)


def outcome(answered: Answered) -> str:
    """The verdict, without what differs from one to the next."""
    return answered.verdict.partition(": ")[0] if _is_bad(answered) else answered.verdict


def _is_bad(answered: Answered) -> bool:
    return answered.verdict.startswith(("wrong", "cut", "hang"))


def answers_check(answers: Sequence[Answered], edges: Sequence[str], deaths: Deaths) -> Check:
    """Every answer is right, or an error as errors are, or was cut off by its edge's death."""
    problems = [
        f"{it.verdict} ({it.asked.act}, {it.asked.tenant}, {edges[it.asked.edge]}, "
        f"{it.ended - it.began:.1f} s, request {it.request_id})"
        for it in answers
        if _is_bad(it) and not _cut_by_death(it, edges, deaths)
    ]
    longest_s = max((it.ended - it.began for it in answers), default=0.0)
    seen = f"{len(answers):,} requests, the longest {longest_s:.0f} s"
    return Check(name="answers", problems=problems, seen=seen)


def _cut_by_death(it: Answered, edges: Sequence[str], deaths: Deaths) -> bool:
    return it.verdict.startswith("cut") and deaths.killed(
        "edge", it.began, it.ended, edges[it.asked.edge]
    )


def findings_check(
    findings: Sequence[Finding],
    answers: Sequence[Answered],
    rows: Mapping[str, LedgerRow],
    deaths: Deaths,
) -> Check:
    """The ledger lacks what an edge was at when it was killed, the journals what a front was."""
    ended = {it.request_id: it for it in answers if it.request_id}
    problems = []
    for finding in findings:
        match finding:
            case Missing(request_id=request_id, row=row):
                known = ended.get(request_id)
                end = known.ended if known else row.ended
                good = deaths.killed("edge", deaths.asleep_since("front", row.started), end)
            case Short(request_id=request_id):
                row = rows[request_id]
                good = deaths.killed("front", row.started, row.ended)
            case _:
                good = False
        if not good:
            problems.append(repr(finding))
    kinds = Counter(type(finding).__name__.lower() for finding in findings)
    seen = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no finding"
    return Check(name="each finding of reconciliation has its kill", problems=problems, seen=seen)


def told_check(
    answers: Sequence[Answered],
    rows: Mapping[str, LedgerRow],
    edges: Sequence[str],
    deaths: Deaths,
) -> Check:
    """Who got an answer, or the beginning of one, has one row, which says what they were told.

    There is none where the edge was killed, and every front that knew of the request as well.
    """
    problems = []
    known = [it for it in answers if it.request_id and not it.verdict.startswith("refused")]
    for it in known:
        row = rows.get(it.request_id or "")
        if row is None:
            edge = edges[it.asked.edge]
            both = deaths.killed("edge", it.began, it.ended, edge) and deaths.killed(
                "front", it.began, it.ended
            )
            problems += [] if both else [f"no row: {it.verdict}, request {it.request_id}"]
        elif problem := _differs(it, row):
            problems.append(f"{problem}: request {it.request_id}, {it.verdict}, {row}")
    return Check(name="usage as told, once", problems=problems, seen=f"{len(known)} answers")


def _differs(it: Answered, row: LedgerRow) -> str | None:
    if row.prompt_tokens != len(it.asked.prompt_ids):
        return "another prompt"
    if row.account != it.asked.tenant and (row.account or row.source == "edge"):
        return "another account"
    told = it.usage.get("completion_tokens")
    if told is None:
        return None
    if row.source == "journal":  # of what was made, the client was told a part
        return None if row.completion_tokens >= told else "fewer tokens than told"
    return None if row.completion_tokens == told else "other tokens than told"


def rows_check(rows: Sequence[LedgerRow], answers: Sequence[Answered]) -> Check:
    """No row for what nobody asked, and none twice."""
    counts = Counter(row.request_id for row in rows)
    problems = [f"{count} rows: {name}" for name, count in counts.items() if count > 1]
    if len(rows) > len(answers):
        problems.append(f"{len(rows)} rows of {len(answers)} requests")
    added = sum(row.source == "journal" for row in rows)
    several = sum("," in row.regions for row in rows)
    seen = f"{len(rows):,} rows, {added} of journals, {several} over several regions"
    return Check(name="a row a request", problems=problems, seen=seen)


def table(answers: Sequence[Answered], faults: Sequence[Fault], checks: Sequence[Check]) -> str:
    """Requests by outcome, faults by kind, and the checks, as Markdown."""
    outcomes = Counter(map(outcome, answers))
    done = Counter((fault.kind, fault.what) for fault in faults)
    kinds = sorted({kind for kind, _ in done})
    parts = [
        markdown(
            ["requests", "count"],
            [[name, f"{count:,}"] for name, count in outcomes.most_common()],
        ),
        markdown(
            ["faults", "killed", "paused"],
            [[kind, str(done[kind, "kill"]), str(done[kind, "pause"])] for kind in kinds],
        ),
        markdown(
            ["check", "seen", "result"],
            [[it.name, it.seen, "FAILED" if it.problems else "ok"] for it in checks],
        ),
    ]
    for check in checks:
        parts += [f"{check.name}: {problem}\n" for problem in check.problems[:_SHOWN]]
        if len(check.problems) > _SHOWN:
            parts.append(f"{check.name}: and {len(check.problems) - _SHOWN} more\n")
    return "\n".join(parts)
