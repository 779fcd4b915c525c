"""What answers cost."""

from __future__ import annotations

import pytest

from edge.prices import USD_A_NEURON, Prices, derived
from routing.catalogue import Price, load_catalogue

PRICES = Prices(load_catalogue().rows)
ONE_B = "@cf/meta/llama-3.2-1b-instruct"


def test_a_million_tokens_cost_what_the_row_says() -> None:
    def neurons(prompt: int = 0, cached: int = 0, completion: int = 0) -> float:
        return PRICES.neurons(ONE_B, prompt=prompt, cached=cached, completion=completion)

    million = 1_000_000
    assert neurons(prompt=million) == 2457
    assert neurons(completion=million) == 18252
    assert neurons(prompt=million, cached=million) == pytest.approx(2457 / 5)
    assert neurons(prompt=million, cached=400_000) == pytest.approx(0.6 * 2457 + 0.4 * 2457 / 5)
    assert neurons(prompt=5, cached=9) == neurons(prompt=5, cached=5)
    # 0.027 and 0.201 USD, as Workers AI has them
    assert neurons(prompt=million) * USD_A_NEURON == pytest.approx(0.027, abs=0.0005)
    assert neurons(completion=million) * USD_A_NEURON == pytest.approx(0.201, abs=0.0005)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llama-3.2-1b-instruct", Price(input=2457, output=18252)),
        ("llama-3.1-8b-instruct-fp8-fast", Price(input=4119, output=34868)),
        ("llama-3.3-70b-instruct-fp8-fast", Price(input=26668, output=204805)),
    ],
)
def test_the_derived_price_is_near_the_documented_one(name: str, known: Price) -> None:
    price = derived(f"@cf/meta/{name}")
    assert price.input == pytest.approx(known.input, rel=0.2)
    assert price.output == pytest.approx(known.output, rel=0.2)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("@cf/huggingfacetb/smollm2-135m-instruct", 0.135),
        ("@cf/qwen/qwen2.5-0.5b-instruct", 0.5),
        ("@cf/qwen/qwen3-0.6b", 0.6),
        ("@cf/a/mixtral-8x7b", 8.0),  # not a number of its own: as if it did not say
        ("@cf/a/who-knows", 8.0),
    ],
)
def test_size_is_read_off_the_name(name: str, billions: float) -> None:
    assert derived(name).input == pytest.approx(2100 + 350 * billions)


def test_tasks_are_those_of_the_rows() -> None:
    assert PRICES.task(ONE_B) == "text-generation"
    assert PRICES.task("@cf/none/known") == "text-generation"
