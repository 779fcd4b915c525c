import json
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import auth, keys
from edge.auth import Tenant, Verifier
from tests.fakes.keyring import DAY_S, NOW, Clock, create, refusal


def signed(folder: Path, **claims: Any) -> str:
    """A key signed by the folder's own signing key, saying anything."""
    signing = pem.load_pem_private_key((folder / "signing.pem").read_bytes(), None)
    assert isinstance(signing, Ed25519PrivateKey)
    said = {
        "jti": "0" * 32,
        "sub": "acme",
        "iat": int(NOW),
        "exp": int(NOW) + 60,
        "scopes": ["ai:run"],
    }
    said = {name: value for name, value in (said | claims).items() if value is not None}
    kid = keys.key_id(signing.public_key())
    return jwt.encode(said, signing, algorithm="EdDSA", headers={"kid": kid})


class TestRefusals:
    @pytest.mark.parametrize(
        "authorization",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            "Basic abc",
            "Bearer a.b.c",
            "Bearer abc",
            "Bearer ä.ö.ü",
            "Bearer " + "x" * 5000,
            "Bearer " + "." * 3,
        ],
    )
    def test_what_is_no_key(self, folder: Path, clock: Clock, authorization: str | None) -> None:
        create(folder)
        assert refusal(Verifier(folder, clock), authorization)

    def test_the_scheme_is_read_in_any_case(self, folder: Path, clock: Clock) -> None:
        assert Verifier(folder, clock).tenant(f"bearer  {create(folder)}", "acme")

    def test_a_foreign_account(self, folder: Path, clock: Clock) -> None:
        key = create(folder)
        assert "another account" in refusal(Verifier(folder, clock), f"Bearer {key}", "other")

    def test_a_key_signed_by_someone_else(self, folder: Path, tmp_path: Path, clock: Clock) -> None:
        create(folder)
        foreign = create(tmp_path / "elsewhere")
        assert "signed by nobody" in refusal(Verifier(folder, clock), f"Bearer {foreign}")

    def test_a_signature_that_names_our_key_and_is_not_ours(
        self, folder: Path, clock: Clock
    ) -> None:
        kid = jwt.get_unverified_header(create(folder))["kid"]
        claims = {"jti": "0" * 32, "sub": "acme", "iat": NOW, "exp": NOW + 60, "scopes": ["ai:run"]}
        forged = jwt.encode(claims, Ed25519PrivateKey.generate(), "EdDSA", headers={"kid": kid})
        assert "malformed" in refusal(Verifier(folder, clock), f"Bearer {forged}")

    def test_a_key_whose_claims_were_changed(self, folder: Path, clock: Clock) -> None:
        head, _, signature = create(folder).split(".")
        _, other, _ = create(folder, "other").split(".")
        verifier = Verifier(folder, clock)
        assert "malformed" in refusal(verifier, f"Bearer {head}.{other}.{signature}", "other")

    @pytest.mark.parametrize("algorithm", ["none", "None", "HS256"])
    def test_another_algorithm(self, folder: Path, clock: Clock, algorithm: str) -> None:
        kid = jwt.get_unverified_header(create(folder))["kid"]
        head = {"alg": algorithm, "typ": "JWT", "kid": kid}
        claims = {"jti": "0" * 32, "sub": "acme", "iat": 1, "exp": 2**40, "scopes": ["ai:run"]}
        parts = [urlsafe_b64encode(json.dumps(p).encode()).decode() for p in (head, claims)]
        unsigned = ".".join(part.rstrip("=") for part in parts)
        verifier = Verifier(folder, clock)
        assert refusal(verifier, f"Bearer {unsigned}.")
        assert refusal(verifier, f"Bearer {unsigned}.AAAA")

    @pytest.mark.parametrize(
        "claims",
        [
            {"jti": None},
            {"sub": None},
            {"exp": None},
            {"scopes": None},
            {"exp": "9999999999"},
            {"scopes": "ai:run"},
            {"sub": "a/b"},
            {"scopes": []},
            {"scopes": ["ai:read"]},
            {"limits": "requests=5/min"},
            {"limits": ["requests=5/year"]},  # not ours to guess
            {"priority": "high"},
        ],
    )
    def test_claims_that_say_too_little(
        self, folder: Path, clock: Clock, claims: dict[str, Any]
    ) -> None:
        create(folder)
        verifier = Verifier(folder, clock)
        assert verifier.tenant(f"Bearer {signed(folder)}", "acme")
        account = claims.get("sub") or "acme"
        assert refusal(verifier, f"Bearer {signed(folder, **claims)}", account)

    def test_a_key_that_has_expired_also_when_it_was_good_before(
        self, folder: Path, clock: Clock
    ) -> None:
        key = create(folder, days=1)
        verifier = Verifier(folder, clock)
        clock.now = NOW + DAY_S - 1
        assert verifier.tenant(f"Bearer {key}", "acme")
        clock.now = NOW + DAY_S
        assert "expired" in refusal(verifier, f"Bearer {key}")

    def test_a_header_nested_too_deeply(self, folder: Path, clock: Clock) -> None:
        create(folder)
        head = urlsafe_b64encode(b"[" * 2900).decode()
        assert "malformed" in refusal(Verifier(folder, clock), f"Bearer {head}.e30.AAAA")

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(
        head=st.dictionaries(
            st.sampled_from(["alg", "kid", "typ", "crit", "b64"]),
            st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.text()),
        )
        | st.integers(),
        rest=st.text("abcXYZ019-_=.", max_size=40),
    )
    def test_any_header_is_refused_as_a_failure(
        self, tmp_path_factory: pytest.TempPathFactory, head: Any, rest: str
    ) -> None:
        verifier = Verifier(tmp_path_factory.getbasetemp(), lambda: NOW)
        first = urlsafe_b64encode(json.dumps(head).encode()).decode().rstrip("=")
        assert refusal(verifier, f"Bearer {first}.{rest}")


class TestRevocation:
    def test_it_holds_a_second_later_in_a_running_edge(self, folder: Path, clock: Clock) -> None:
        key, other = create(folder), create(folder)
        verifier = Verifier(folder, clock)
        assert verifier.tenant(f"Bearer {key}", "acme")
        keys.revoke(folder, key)
        clock.now += 1
        assert "revoked" in refusal(verifier, f"Bearer {key}")
        assert verifier.tenant(f"Bearer {other}", "acme")

    def test_it_holds_after_a_restart(self, folder: Path, clock: Clock) -> None:
        key = create(folder)
        jti = keys.revoke(folder, key)
        assert "revoked" in refusal(Verifier(folder, clock), f"Bearer {key}")
        assert keys.revoke(folder, jti) == jti  # once more does no harm
        assert "revoked" in refusal(Verifier(folder, clock), f"Bearer {key}")

    def test_it_holds_when_the_list_is_lost(self, folder: Path, clock: Clock) -> None:
        key, other = create(folder), create(folder)
        keys.revoke(folder, key)
        verifier = Verifier(folder, clock)
        assert refusal(verifier, f"Bearer {key}")
        (folder / "revoked.txt").unlink()
        clock.now += 1
        assert "revoked" in refusal(verifier, f"Bearer {key}")
        assert verifier.tenant(f"Bearer {other}", "acme")
        keys.revoke(folder, other)  # a new list, which does not name the first
        clock.now += 1
        assert "revoked" in refusal(verifier, f"Bearer {key}")
        assert "revoked" in refusal(verifier, f"Bearer {other}")

    def test_it_holds_when_the_list_cannot_be_read(self, folder: Path, clock: Clock) -> None:
        key = create(folder)
        keys.revoke(folder, key)
        verifier = Verifier(folder, clock)
        assert refusal(verifier, f"Bearer {key}")
        (folder / "revoked.txt").unlink()
        (folder / "revoked.txt").mkdir()  # there, and unreadable even to root
        clock.now += 1
        assert "revoked" in refusal(verifier, f"Bearer {key}")
        assert "revoked" in refusal(Verifier(folder, clock), f"Bearer {key}")

    def test_without_a_list_no_key_is_trusted(self, folder: Path, clock: Clock) -> None:
        key = create(folder)
        (folder / "revoked.txt").unlink()
        verifier = Verifier(folder, clock)
        assert refusal(verifier, f"Bearer {key}")
        (folder / "revoked.txt").touch()
        clock.now += 1
        assert verifier.tenant(f"Bearer {key}", "acme")

    def test_the_list_is_looked_at_also_when_the_clock_is_set_back(
        self, folder: Path, clock: Clock
    ) -> None:
        key = create(folder)
        verifier = Verifier(folder, clock)
        assert verifier.tenant(f"Bearer {key}", "acme")
        keys.revoke(folder, key)
        clock.now -= 3600
        assert "revoked" in refusal(verifier, f"Bearer {key}")

    def test_keys_may_be_made_after_the_edge_has_started(self, folder: Path, clock: Clock) -> None:
        verifier = Verifier(folder, clock)
        assert refusal(verifier, None)
        key = create(folder)
        clock.now += 1
        assert verifier.tenant(f"Bearer {key}", "acme")

    def test_a_public_key_that_is_taken_away_is_trusted_no_more(
        self, folder: Path, clock: Clock
    ) -> None:
        key = create(folder)
        verifier = Verifier(folder, clock)
        assert verifier.tenant(f"Bearer {key}", "acme")
        (public,) = (folder / "public").iterdir()
        public.unlink()
        clock.now += 1
        assert "signed by nobody" in refusal(verifier, f"Bearer {key}")

    def test_an_edge_needs_no_private_key(self, folder: Path, clock: Clock) -> None:
        key = create(folder)
        (folder / "signing.pem").unlink()
        (folder / "issued.jsonl").unlink()
        (folder / "public" / "junk.pem").write_text("no key")
        assert Verifier(folder, clock).tenant(f"Bearer {key}", "acme")


class TestTenants:
    def test_the_salt_is_the_accounts_whatever_the_key(self, folder: Path, clock: Clock) -> None:
        def salt(account: str) -> bytes:
            key = create(folder, account)
            return Verifier(folder, clock).tenant(f"Bearer {key}", account).salt

        assert salt("acme") == salt("acme")
        assert len({salt(account) for account in ("acme", "acm", "acmee", "other")}) == 4

    def test_the_cache_is_bounded_and_forgetting_costs_only_a_check(
        self, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "_CACHED_KEYS", 3)
        verifier = Verifier(folder, clock)
        made = [create(folder) for _ in range(5)]
        clock.now += 1

        def tenants() -> list[Tenant]:
            return [verifier.tenant(f"Bearer {key}", "acme") for key in made]

        assert tenants() == tenants()
        assert len(verifier._known) == 3

    def test_a_known_key_costs_no_second_look_at_its_signature(
        self, folder: Path, clock: Clock
    ) -> None:
        key = create(folder)
        verifier = Verifier(folder, clock)
        first = verifier.tenant(f"Bearer {key}", "acme")
        assert verifier.tenant(f"Bearer {key}", "acme") is first
