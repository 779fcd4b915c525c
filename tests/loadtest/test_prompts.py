"""What is asked, and from where, is the same for the same seed."""

from __future__ import annotations

from itertools import islice

from loadtest.places import CITIES, EUROPE, NORTH_AMERICA, city
from loadtest.prompts import MAX_NOTES, prompts


def test_the_same_seed_asks_the_same() -> None:
    assert list(islice(prompts(7), 20)) == list(islice(prompts(7), 20))
    assert list(islice(prompts(7), 20)) != list(islice(prompts(8), 20))


def test_some_prompts_are_long_and_most_are_short() -> None:
    lengths = [prompt.count("\n") for prompt in islice(prompts(1), 200)]
    long = [length for length in lengths if length]
    assert 0 < len(long) < 100
    assert max(long) <= MAX_NOTES


def test_cities_lie_on_their_continent() -> None:
    for here in CITIES[EUROPE]:
        assert 35 < here.latitude < 70
        assert -10 < here.longitude < 30
    for here in CITIES[NORTH_AMERICA]:
        assert 15 < here.latitude < 70
        assert -130 < here.longitude < -60
    assert city(EUROPE, 3) == city(EUROPE, 3)


def test_a_city_says_where_it_is_as_a_proxy_would() -> None:
    boston = next(one for one in CITIES[NORTH_AMERICA] if one.name == "Boston")
    assert boston.headers == {"cf-iplatitude": "42.36", "cf-iplongitude": "-71.06"}
