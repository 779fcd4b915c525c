"""From readings of clocks to CPU seconds per million output tokens, and wake-ups. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# What others say of themselves, for the engine with its scheduler and its HTTP server.
INFIRE, VLLM = 14.5, 81.0  # 25 % of a core at 17,224 tokens/s; 140 % of one: see README.md
TARGETS = {"worker, all": 15.0, "front": 10.0, "edge": 35.0, "all": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Clocks and counters at one instant, all since some start."""

    at_s: float  # monotonic
    tokens: int  # that the engine has made
    scheduler_s: float  # CPU seconds, as all below
    engine_s: float  # its process, the scheduler included
    worker_s: float
    front_s: float
    edge_s: float
    wakeups: Mapping[str, int]  # by process


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """One window: CPU seconds a part per million output tokens."""

    tokens_per_s: float
    parts: dict[str, float]
    wakeups: dict[str, float]  # a token, by process


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All windows of one number of streams."""

    num_streams: int
    step_s: float
    windows: Sequence[Shares]
    tokens_per_event: float  # as clients got them


def shares(before: Reading, after: Reading) -> Shares:
    """What was spent between two readings; ValueError when no token was made."""
    tokens = after.tokens - before.tokens
    if tokens <= 0:
        raise ValueError("no token was made between the readings")

    def spent(name: str) -> float:
        seconds: float = getattr(after, name) - getattr(before, name)
        return 1e6 * seconds / tokens

    parts = {
        "scheduler": spent("scheduler_s"),
        "engine loop": spent("engine_s") - spent("scheduler_s"),
        "worker process": spent("worker_s"),
        "worker, all": spent("engine_s") + spent("worker_s"),
        "front": spent("front_s"),
        "edge": spent("edge_s"),
    }
    parts["all"] = parts["worker, all"] + parts["front"] + parts["edge"]
    woken = {name: (count - before.wakeups[name]) / tokens for name, count in after.wakeups.items()}
    speed = tokens / (after.at_s - before.at_s)
    return Shares(tokens_per_s=speed, parts=parts, wakeups=woken)


def lines_of(runs: Sequence[Run]) -> list[str]:
    """A Markdown table: a row a part, a column a number of streams; median (least-most)."""
    heads = [f"{run.num_streams:,} streams" for run in runs]
    lines = [_row(["CPU-s per M tokens", *heads, "target", "Infire", "vLLM"])]
    lines.append("|---" * (len(heads) + 4) + "|")
    for part in runs[0].windows[0].parts:
        spent = [_spread([it.parts[part] for it in run.windows], 1) for run in runs]
        others = [f"{INFIRE:g}", f"{VLLM:g}"] if part == "worker, all" else ["", ""]
        target = f"<= {TARGETS[part]:g}" if part in TARGETS else ""
        lines.append(_row([part, *spent, target, *others]))
    for name in runs[0].windows[0].wakeups:
        woken = [_spread([it.wakeups[name] for it in run.windows], 2) for run in runs]
        lines.append(_row([f"wake-ups a token: {name}", *woken, "", "", ""]))
    speeds = [_spread([it.tokens_per_s for it in run.windows], 0) for run in runs]
    lines.append(_row(["tokens/s", *speeds, "", "", ""]))
    steps = [f"{1000 * run.step_s:.1f} ms" for run in runs]
    lines.append(_row(["step", *steps, "", "", ""]))
    merged = [f"{run.tokens_per_event:.2f}" for run in runs]
    lines.append(_row(["tokens an event", *merged, "", "", ""]))
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    least, most = min(values), max(values)
    return f"{median(values):,.{digits}f} ({least:,.{digits}f}-{most:,.{digits}f})"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
