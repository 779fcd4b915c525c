"""What the machine would allow in figures of the peers table, and how much of it ours reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from msgspec import Struct

from loadtest.bench.measure import Plan
from loadtest.bench.roofline import Machine, Model
from loadtest.bench.rounds import Round, level_column, prefill_column
from loadtest.bench.table import markdown, number

WEIGHT_BYTES = (2.0, 1.5)  # BF16, 12 bits


class Limit(Struct, frozen=True):
    """One figure of a round, and the most that it can be: None where that was not measured."""

    title: str
    rate: float | None
    figure: Callable[[Round], float | None]


def limits(plan: Plan, model: Model, machine: Machine) -> list[Limit]:
    """Of one stream, of the most streams and of every long prompt."""
    found = []
    if 1 in plan.concurrency:
        figure = level_column(1).figure
        for weight_bytes in WEIGHT_BYTES:
            rate = 1 / _step_s(plan, model, machine, 1, weight_bytes)
            found.append(Limit(f"1 stream, {weight_bytes:g} bytes a weight", rate, figure))
    if (most := max(plan.concurrency)) > 1:
        rate = _output_rate(plan, model, machine, most)
        found.append(Limit(f"{most} streams", rate, level_column(most).figure))
    for num_tokens in plan.prefill_tokens:
        least_s = model.prefill_s(machine, num_tokens)
        limit_rate = num_tokens / least_s if least_s else None
        title = f"prefill {num_tokens:,}"
        found.append(Limit(title, limit_rate, prefill_column(num_tokens).figure))
    return found


def limits_part(rounds: Sequence[Round], plan: Plan, model: Model, machine: Machine) -> str:
    """A table of the limits and of what each of ours reached of them, and how they came about."""
    found = limits(plan, model, machine)
    rows = [
        ["this machine, tok/s", *("-" if one.rate is None else number(one.rate) for one in found)]
    ]
    ours: dict[str, list[Round]] = {}
    for one in rounds:
        if one.ours:
            ours.setdefault(one.server, []).append(one)
    rows += [[name, *(_reached(one, group) for one in found)] for name, group in ours.items()]
    said = f"Roofline: {machine}, the better of before and after the rounds; the longer of reading "
    said += "and multiplying. Many streams: prompts included"
    return f"{markdown(['', *(one.title for one in found)], rows)}\n{said}.\n"


def _reached(limit: Limit, group: Sequence[Round]) -> str:
    figures = [figure for one in group if (figure := limit.figure(one)) is not None]
    if not figures or limit.rate is None:
        return "-"
    return f"{100 * statistics.median(figures) / limit.rate:.0f} %"


def _step_s(plan: Plan, model: Model, machine: Machine, batch: int, weight_bytes: float) -> float:
    """Of a decode step in the middle of the answers."""
    context = plan.prompt_tokens + plan.output_tokens // 2
    return model.step_s(machine, batch=batch, context=context, weight_bytes=weight_bytes)


def _output_rate(plan: Plan, model: Model, machine: Machine, batch: int) -> float:
    """Tokens a second from the requests to the last answer's end; weights as small as they get."""
    step_s = _step_s(plan, model, machine, batch, min(WEIGHT_BYTES))
    prompts_s = batch * model.prefill_s(machine, plan.prompt_tokens)
    return batch * plan.output_tokens / (prompts_s + (plan.output_tokens - 1) * step_s)
