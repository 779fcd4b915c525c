"""Figures of several servers over several rounds, and the table they make. No measuring, no I/O."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from loadtest.bench.measure import Level, Served
from loadtest.bench.table import markdown, number

GAPS_AT = 8  # streams at which inter-token latency is shown


class Round(Struct, frozen=True, kw_only=True):
    """One server, started, measured and stopped once."""

    server: str
    version: str
    ours: bool
    round: int
    served: Served
    start_s: float  # to the first token; of ours a worker and its engine
    peak_bytes: int | None = None  # with the KV in use; of ours a worker and its engine


class Missed(Struct, frozen=True, kw_only=True):
    """A round, or a part of it, in which a server could not be measured."""

    server: str
    version: str
    round: int
    what: str  # is missing: "figures", all of them, or "peak memory"
    why: str


class Column(Struct, frozen=True):
    """One figure of a round, None where it was not measured."""

    title: str
    figure: Callable[[Round], float | None]
    more_is_better: bool = True


def columns(rounds: Sequence[Round]) -> list[Column]:
    """Those that the rounds have figures for."""
    served = rounds[0].served
    found = [level_column(level.concurrency) for level in served.levels]
    found += [prefill_column(prefill.prompt_tokens) for prefill in served.prefills]
    if any(level.concurrency == GAPS_AT for level in served.levels):
        found += [
            Column(
                "ITL at 8, p50, ms", lambda one: _at(one, GAPS_AT).gap_p50_ms, more_is_better=False
            ),
            Column("p99, ms", lambda one: _at(one, GAPS_AT).gap_p99_ms, False),
        ]
    found.append(Column("start to first token, s", lambda one: one.start_s, False))
    return [*found, Column("peak memory, MB", _peak_mb, False)]


def level_column(concurrency: int) -> Column:
    """Of so many streams at once."""
    if concurrency == 1:
        return Column("1 stream, decode tok/s", lambda one: _at(one, 1).decode_rate)
    title = f"{concurrency}, output tok/s"
    return Column(title, lambda one: _at(one, concurrency).output_rate)


def prefill_column(num_tokens: int) -> Column:
    """Of prompts of so many tokens."""

    def rate(one: Round) -> float:
        found = [each for each in one.served.prefills if each.prompt_tokens == num_tokens]
        return found[0].rate

    return Column(f"prefill {num_tokens:,}, tok/s", rate)


def peers_table(rounds: Sequence[Round], missed: Sequence[Missed] = ()) -> str:
    """A row a server, and one for each of ours over the best peer; medians with their range.

    A server that was never measured has a row, too.
    """
    shown = columns(rounds)
    every: list[Round | Missed] = [*rounds, *missed]
    by_server: dict[str, list[Round]] = {one.server: [] for one in every}
    for one in rounds:
        by_server[one.server].append(one)
    num_rounds = len({one.round for one in every})
    rows = [
        [_row_name(name, group, num_rounds), *(_cell(_figures(one, group)) for one in shown)]
        for name, group in by_server.items()
    ]
    measured = {name: group for name, group in by_server.items() if group}
    peers = [group for group in measured.values() if not group[0].ours]
    for name, group in measured.items():
        if group[0].ours and peers:
            ratios = [_ratio(column, group, peers) for column in shown]
            rows.append([f"{name} / best peer", *ratios])
    return markdown(["", *(column.title for column in shown)], rows)


def notes(rounds: Sequence[Round], missed: Sequence[Missed] = ()) -> list[str]:
    """What the table does not show, a sentence each."""
    counted = {one.round for one in rounds} | {one.round for one in missed}
    short: Counter[str] = Counter()
    for one in rounds:
        short[one.server] += sum(level.num_short for level in one.served.levels)
    share = max(level.client_share for one in rounds for level in one.served.levels)
    said = [f"Rounds: {len(counted)}; medians, least and most in brackets."]
    said += [
        f"{one.server}, round {one.round + 1}: {one.what} not measured: {one.why}" for one in missed
    ]
    said += [f"{name}: {num} answers ended early." for name, num in short.items() if num]
    return [*said, f"The measuring client took at most {100 * share:.0f} % of a core."]


def _row_name(server: str, group: Sequence[Round], num_rounds: int) -> str:
    """Says so when the row is not of all rounds."""
    return server if len(group) == num_rounds else f"{server} ({len(group)} of {num_rounds} rounds)"


def _figures(column: Column, group: Iterable[Round]) -> list[float]:
    return [value for one in group if (value := column.figure(one)) is not None]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def _ratio(column: Column, ours: Sequence[Round], peers: Sequence[Sequence[Round]]) -> str:
    """Our median over the best peer's median."""
    medians = [statistics.median(values) for peer in peers if (values := _figures(column, peer))]
    mine = _figures(column, ours)
    if not medians or not mine:
        return "-"
    best = max(medians) if column.more_is_better else min(medians)
    return f"{statistics.median(mine) / best:.2f}x"


def _at(one: Round, concurrency: int) -> Level:
    return next(level for level in one.served.levels if level.concurrency == concurrency)


def _peak_mb(one: Round) -> float | None:
    return None if one.peak_bytes is None else one.peak_bytes / 1e6
