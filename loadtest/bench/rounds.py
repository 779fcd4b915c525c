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


class Column(Struct, frozen=True):
    """One figure of a round, None where it was not measured."""

    title: str
    figure: Callable[[Round], float | None]
    more_is_better: bool = True


def columns(rounds: Sequence[Round]) -> list[Column]:
    """Those that the rounds have figures for."""
    served = rounds[0].served
    found = [_level_column(level.concurrency) for level in served.levels]
    found += [_prefill_column(prefill.prompt_tokens) for prefill in served.prefills]
    if any(level.concurrency == GAPS_AT for level in served.levels):
        found += [
            Column(
                "ITL at 8, p50, ms", lambda one: _at(one, GAPS_AT).gap_p50_ms, more_is_better=False
            ),
            Column("p99, ms", lambda one: _at(one, GAPS_AT).gap_p99_ms, False),
        ]
    found.append(Column("start to first token, s", lambda one: one.start_s, False))
    return [*found, Column("peak memory, MB", _peak_mb, False)]


def peers_table(rounds: Sequence[Round]) -> str:
    """A row a server, and one for each of ours over the best peer; medians with their range."""
    shown = columns(rounds)
    by_server: dict[str, list[Round]] = {one.server: [] for one in rounds}
    for one in rounds:
        by_server[one.server].append(one)
    rows = [
        [name, *(_cell(_figures(column, group)) for column in shown)]
        for name, group in by_server.items()
    ]
    peers = [group for group in by_server.values() if not group[0].ours]
    for name, group in by_server.items():
        if group[0].ours and peers:
            ratios = [_ratio(column, group, peers) for column in shown]
            rows.append([f"{name} / best peer", *ratios])
    return markdown(["", *(column.title for column in shown)], rows)


def notes(rounds: Sequence[Round]) -> list[str]:
    """What the table does not show, a sentence each."""
    counted = {one.round for one in rounds}
    short: Counter[str] = Counter()
    for one in rounds:
        short[one.server] += sum(level.num_short for level in one.served.levels)
    share = max(level.client_share for one in rounds for level in one.served.levels)
    said = [f"Rounds: {len(counted)}; medians, least and most in brackets."]
    said += [f"{name}: {num} answers ended early." for name, num in short.items() if num]
    return [*said, f"The measuring client took at most {100 * share:.0f} % of a core."]


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


def _level_column(concurrency: int) -> Column:
    if concurrency == 1:
        return Column("1 stream, decode tok/s", lambda one: _at(one, 1).decode_rate)
    title = f"{concurrency}, output tok/s"
    return Column(title, lambda one: _at(one, concurrency).output_rate)


def _prefill_column(num_tokens: int) -> Column:
    def rate(one: Round) -> float:
        found = [each for each in one.served.prefills if each.prompt_tokens == num_tokens]
        return found[0].rate

    return Column(f"prefill {num_tokens:,}, tok/s", rate)


def _at(one: Round, concurrency: int) -> Level:
    return next(level for level in one.served.levels if level.concurrency == concurrency)


def _peak_mb(one: Round) -> float | None:
    return None if one.peak_bytes is None else one.peak_bytes / 1e6
