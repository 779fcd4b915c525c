"""What answers cost, in neurons and in USD, by the price that each model's row has. Pure.

A neuron is Workers AI's unit: a million tokens of a model take so many of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from routing.catalogue import ModelRow, Price

USD_A_NEURON = 0.011 / 1000  # as Workers AI charges
_MILLION = 1_000_000

# Where a row has no price: a line through Workers AI's own (1B, 8B and 70B parameters, 2026-07),
# off by 20 % at most there. Cached input costs a fifth, as theirs does.
_INPUT, _INPUT_A_BILLION = 2_100.0, 350.0
_OUTPUT, _OUTPUT_A_BILLION = 15_600.0, 2_700.0
_CACHED_SHARE = 0.2
_UNSAID_BILLIONS = 8.0  # parameters of a model whose name does not say
_SIZE = re.compile(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d{1,3})?)(b|m)(?![a-z0-9])")


class Prices:
    def __init__(self, rows: Mapping[str, ModelRow]) -> None:
        self._rows = rows

    def task(self, model: str) -> str:
        """As limits name it."""
        row = self._rows.get(model)
        return row.task if row else "text-generation"

    def price(self, model: str) -> Price:
        row = self._rows.get(model)
        return row.price if row and row.price else derived(model)

    def neurons(self, model: str, *, prompt: int, cached: int, completion: int) -> float:
        """Of answers that took so many tokens; the `cached` are among those of the prompt."""
        price = self.price(model)
        cached = min(cached, prompt)
        of_prompt = (prompt - cached) * price.input + cached * cached_price(price)
        return (of_prompt + completion * price.output) / _MILLION


def cached_price(price: Price) -> float:
    return _CACHED_SHARE * price.input if price.cached is None else price.cached


def derived(model: str) -> Price:
    """By the number of parameters in the model's name, the last that is there."""
    sizes = _SIZE.findall(model.lower())
    billions = _UNSAID_BILLIONS
    if sizes:
        number, unit = sizes[-1]
        billions = float(number) / (1000 if unit == "m" else 1)
    return Price(
        input=_INPUT + _INPUT_A_BILLION * billions, output=_OUTPUT + _OUTPUT_A_BILLION * billions
    )
