"""Affinity keys and rendezvous hashing: stable, even, and apart for each account."""

from __future__ import annotations

from collections import Counter

from routing.affinity import PREFIX_TOKENS, by_rendezvous, prefix_key, session_key

REGIONS = ["weur", "enam", "wnam", "apac", "oc"]


def keys(count: int) -> list[bytes]:
    return [session_key("account", f"session-{n}") for n in range(count)]


def test_all_edges_agree_whatever_order_they_know_regions_in() -> None:
    for key in keys(50):
        assert by_rendezvous(key, REGIONS) == by_rendezvous(key, reversed(REGIONS))


def test_keys_are_spread_evenly() -> None:
    first = Counter(by_rendezvous(key, REGIONS)[0] for key in keys(5000))
    assert all(850 <= first[name] <= 1150 for name in REGIONS)


def test_a_region_that_leaves_moves_only_its_own_keys() -> None:
    without = [name for name in REGIONS if name != "enam"]
    for key in keys(500):
        before, after = by_rendezvous(key, REGIONS), by_rendezvous(key, without)
        assert [name for name in before if name != "enam"] == after


def test_accounts_do_not_share_keys() -> None:
    assert session_key("a", "chat") != session_key("b", "chat")
    assert session_key("ab", "c") != session_key("a", "bc")
    ids = list(range(PREFIX_TOKENS))
    assert prefix_key("a", ids) != prefix_key("b", ids)


def test_a_conversation_keeps_its_prefix_key_as_it_grows() -> None:
    ids = list(range(PREFIX_TOKENS))
    assert prefix_key("a", ids) == prefix_key("a", [*ids, 5, 6, 7])
    assert prefix_key("a", ids) != prefix_key("a", [9, *ids[1:]])
    assert prefix_key("a", ids[:-1]) is None
