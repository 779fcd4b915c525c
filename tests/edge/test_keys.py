"""Keys as the `edge key` commands make, list and revoke them."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from typing import Any

import jwt
import pytest

from edge import keys
from edge.auth import Verifier
from edge.limits import parse_limit
from tests.fakes.keyring import DAY_S, NOW, Clock, create


def test_a_key_opens_its_account(folder: Path, clock: Clock) -> None:
    key = create(folder)
    tenant = Verifier(folder, clock).tenant(f"Bearer {key}", "acme")
    assert tenant.account == "acme"
    assert tenant.scopes == {"ai:run"}
    assert tenant.key_id == jwt.decode(key, options={"verify_signature": False})["jti"]


def test_only_the_owner_can_read_the_signing_key(folder: Path) -> None:
    create(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("signing.pem", "revoked.txt", "issued.jsonl"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_a_signing_key_that_others_can_read_is_not_used(folder: Path) -> None:
    create(folder)
    (folder / "signing.pem").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        create(folder)


@pytest.mark.parametrize("name", ["text-genration", "token", "@cf/meta", "request"])
def test_a_limit_that_would_limit_nothing_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}=5/min': {name} is no model and none of"):
        create(folder, grant=keys.Grant(limits=(f"{name}=5/min",)))
    assert not folder.exists()


def test_later_keys_are_signed_by_the_same_key(folder: Path, clock: Clock) -> None:
    before = create(folder)
    (pem_file,) = (folder / "public").iterdir()
    after = create(folder, "other")
    assert list((folder / "public").iterdir()) == [pem_file]
    verifier = Verifier(folder, clock)
    assert verifier.tenant(f"Bearer {before}", "acme")
    assert verifier.tenant(f"Bearer {after}", "other")


def test_keys_made_at_once_share_one_signing_key(folder: Path, clock: Clock) -> None:
    start = threading.Barrier(8)
    made: list[str] = []

    def make() -> None:
        start.wait()
        made.append(create(folder))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((folder / "public").iterdir())) == 1
    assert {path.name for path in folder.iterdir()} == {
        *["signing.pem", "public", "revoked.txt", "issued.jsonl"]
    }  # and no drafts
    verifier = Verifier(folder, clock)
    assert len({verifier.tenant(f"Bearer {key}", "acme").key_id for key in made}) == 8


@pytest.mark.parametrize("account", ["", "a b", "a/b", "ä", "x" * 65, "a\n"])
def test_an_account_id_has_a_form(folder: Path, account: str) -> None:
    with pytest.raises(ValueError, match="account id"):
        create(folder, account)
    assert not folder.exists()


def test_what_a_key_may_is_in_the_key(folder: Path, clock: Clock) -> None:
    limits = ("text-generation=600/min", "usd=5/month")
    key = create(folder, grant=keys.Grant(limits=limits, priority=-3))
    tenant = Verifier(folder, clock).tenant(f"Bearer {key}", "acme")
    assert tenant.limits == tuple(map(parse_limit, limits))
    assert tenant.priority == -3
    (issued,) = keys.listing(folder)
    assert (issued.limits, issued.priority) == (limits, -3)


@pytest.mark.parametrize(
    ("grant", "says"),
    [
        ({"limits": ("requests=5/day",)}, "by s, min or hour"),
        ({"limits": ("much",)}, "NAME=COUNT/PERIOD"),
        ({"priority": 101}, "-100 to 100"),
        ({"priority": -101}, "-100 to 100"),
    ],
)
def test_what_no_key_may_say(grant: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        keys.Grant(**grant)


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_a_key_lasts_some_days(folder: Path, days: int) -> None:
    with pytest.raises(ValueError, match="days"):
        create(folder, days=days)


def test_the_listing_tells_keys_without_holding_them(folder: Path) -> None:
    first, second = create(folder), create(folder, "other", days=1)
    keys.revoke(folder, second)
    one, two = keys.listing(folder)
    assert (one.account, one.expires, one.revoked) == ("acme", int(NOW) + 30 * DAY_S, False)
    assert (two.account, two.expires, two.revoked) == ("other", int(NOW) + DAY_S, True)
    assert first.rsplit(".", 1)[1] not in (folder / "issued.jsonl").read_text()


def test_a_folder_without_keys_lists_none(folder: Path) -> None:
    assert keys.listing(folder) == ()


@pytest.mark.parametrize("wrong", ["", "abc", "a.b.c", "g" * 32, "../" * 11])
def test_only_keys_and_their_ids_can_be_revoked(folder: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match="neither a key nor"):
        keys.revoke(folder, wrong)
