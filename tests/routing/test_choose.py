"""Ranking regions: near, well, with room; and the reasons it gives."""

from __future__ import annotations

import random
from dataclasses import replace

from routing.affinity import by_rendezvous, session_key
from routing.choose import Choice, Known, Wanted, context_window, rank, refusal
from routing.errors import Code
from routing.health import Breaker
from routing.region import ModelReport, Place, Region, RegionReport

NOW = 100.0
PLACES = {
    "weur": Place(50.1, 8.7),  # Frankfurt
    "neur": Place(52.4, 4.9),  # Amsterdam: 365 km from there
    "enam": Place(39.0, -77.5),  # Virginia
    "apac": Place(1.3, 103.8),  # Singapore
}
MAINZ = Place(50.0, 8.3)


def model(name: str = "m", tokens: int = 8192, tokenizer: str = "t") -> ModelReport:
    return ModelReport(
        model=name,
        model_digest="d",
        tokenizer_digest=tokenizer,
        context_window=8192,
        max_sequence_tokens=tokens,
    )


def known(
    name: str, *, room: int = 4, models: tuple[ModelReport, ...] = (model(),), age_s: float = 0.5
) -> Known:
    return Known(
        region=Region(name=name, url="http://127.0.0.1:9", place=PLACES[name]),
        report=RegionReport(region=name, epoch="1", room=room, models=models, processes=()),
        reported_at=NOW - age_s,
        rtt_ms=10.0,
        connected=True,
    )


def names(regions: list[Known], wanted: Wanted) -> list[str]:
    return [choice.region for choice in rank(regions, wanted, NOW)]


EVERYWHERE = [known(name) for name in PLACES]
FROM_MAINZ = Wanted(model="m", place=MAINZ)


def test_the_nearest_goes_first() -> None:
    assert names(EVERYWHERE, FROM_MAINZ) == ["weur", "neur", "enam", "apac"]
    assert names(EVERYWHERE, Wanted(model="m", place=Place(-6, 107)))[0] == "apac"


def test_an_unknown_place_goes_by_round_trip_and_the_unmeasured_last() -> None:
    rtt = {"weur": 30.0, "neur": None, "enam": 5.0, "apac": 90.0}
    regions = [replace(known(name), rtt_ms=rtt[name]) for name in PLACES]
    assert names(regions, Wanted(model="m")) == ["enam", "weur", "apac", "neur"]


def test_a_full_region_goes_behind_those_with_room() -> None:
    regions = [known("weur", room=0), known("enam"), known("apac")]
    assert names(regions, FROM_MAINZ) == ["enam", "apac", "weur"]


def test_a_stale_or_unconnected_region_goes_behind_a_full_one() -> None:
    regions = [
        known("weur", age_s=5.1),
        replace(known("neur"), connected=False),
        known("apac", room=0),
        known("enam", age_s=4.9),
    ]
    assert names(regions, FROM_MAINZ) == ["enam", "apac", "weur", "neur"]


def test_a_region_without_the_model_is_left_out() -> None:
    regions = [known("weur", models=(model("other"),)), known("enam"), known("apac", models=())]
    assert names(regions, FROM_MAINZ) == ["enam"]


def test_a_region_whose_breaker_is_open_is_left_out_and_probed_in_its_place_later() -> None:
    breaker = Breaker(max_failures=1, cool_down_s=10)
    regions = [replace(known("weur"), breaker=breaker.failed(NOW - 1)), known("enam")]
    assert names(regions, FROM_MAINZ) == ["enam"]
    regions[0] = replace(known("weur"), breaker=breaker.failed(NOW - 10))
    assert names(regions, FROM_MAINZ) == ["weur", "enam"]
    regions[0] = replace(regions[0], breaker=regions[0].breaker.called(NOW))
    assert names(regions, FROM_MAINZ) == ["enam"]


def test_a_request_that_would_not_fit_is_not_sent() -> None:
    regions = [known("weur", models=(model(tokens=4096),)), known("enam")]
    assert names(regions, replace(FROM_MAINZ, num_tokens=4096))[0] == "weur"
    assert names(regions, replace(FROM_MAINZ, num_tokens=4097)) == ["enam"]
    assert context_window(regions, "m") == 8192
    assert context_window(regions, "other") is None


def test_ids_go_only_where_the_same_tokenizer_is() -> None:
    regions = [known("weur", models=(model(tokenizer="new"),)), known("enam")]
    assert names(regions, replace(FROM_MAINZ, tokenizer_digest="t")) == ["enam"]
    assert names(regions, FROM_MAINZ) == ["weur", "enam"]


def test_a_session_prefers_its_region_among_near_ones_only() -> None:
    cologne = Place(50.9, 7.0)  # 152 km from Frankfurt, 221 km from Amsterdam
    chosen = set()
    for n in range(40):
        key = session_key("account", str(n))
        order = names(EVERYWHERE, Wanted(model="m", place=cologne, affinity=key))
        assert order[:2] == by_rendezvous(key, ["weur", "neur"])
        assert order[2:] == ["enam", "apac"]
        chosen.add(order[0])
    assert chosen == {"weur", "neur"}


def test_a_session_whose_region_is_full_spills_to_the_next() -> None:
    cologne = Place(50.9, 7.0)
    key = session_key("account", "1")
    first, second = by_rendezvous(key, ["weur", "neur"])
    regions = [known(first, room=0), known(second), known("enam")]
    order = names(regions, Wanted(model="m", place=cologne, affinity=key))
    assert order == [second, "enam", first]


def test_reasons_are_told() -> None:
    choice = rank([known("weur", room=3)], replace(FROM_MAINZ, affinity=b"key"), NOW)[0]
    assert choice.reasons == ("31 km", "room 3", "affinity 1 of 1")


def test_a_refusal_says_what_is_wrong() -> None:
    unheard = Known(region=EVERYWHERE[0].region)
    assert refusal([], "m", NOW).code is Code.UNAVAILABLE
    assert refusal([unheard], "m", NOW).code is Code.UNAVAILABLE
    assert refusal(EVERYWHERE, "other", NOW).code is Code.UNKNOWN_MODEL
    restarting = replace(known("weur", models=()), served=frozenset(["m"]))
    assert refusal([restarting, known("neur", models=())], "m", NOW).code is Code.UNAVAILABLE
    dead = replace(known("weur"), breaker=Breaker(max_failures=1, cool_down_s=7).failed(NOW))
    failure = refusal([dead], "m", NOW)
    assert (failure.code, failure.retry_after_s) == (Code.UNAVAILABLE, 7.0)


def test_no_able_region_is_lost_or_tried_twice() -> None:
    """Random walk over everything that moves: each able region stands once, in order of tier."""
    rng = random.Random(3)
    for _ in range(500):
        regions = []
        for name in PLACES:
            breaker = Breaker(max_failures=1)
            one = known(
                name,
                room=rng.choice([0, 0, 1, 9]),
                models=(model(rng.choice("mmmx")),),
                age_s=rng.uniform(0, 8),
            )
            one = replace(
                one,
                connected=rng.random() < 0.8,
                rtt_ms=rng.choice([None, rng.uniform(1, 50)]),
                breaker=breaker.failed(NOW - 9 * rng.random()) if rng.random() < 0.3 else breaker,
            )
            regions.append(one)
        wanted = Wanted(
            model="m",
            place=rng.choice([None, MAINZ]),
            affinity=rng.choice([None, rng.randbytes(4)]),
        )
        choices = rank(regions, wanted, NOW)
        able = {k.region.name for k in regions if k.model("m") and k.breaker.admits(NOW)}
        assert sorted(choice.region for choice in choices) == sorted(able)
        tiers = [_tier(choice) for choice in choices]
        assert tiers == sorted(tiers)


def _tier(choice: Choice) -> int:
    state = choice.reasons[1]
    return 0 if state.startswith("room") else 1 if state == "no room" else 2
