"""Webhooks: a real receiver, signatures, tries, and addresses that nobody may have called."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from edge import webhooks
from edge.checks import BadField
from edge.public_urls import NotPublic, checked_url, is_public, target
from edge.store import Store
from edge.webhooks import signed
from tests.edge.test_queued import asked, ended, queue
from tests.fakes.counting_region import CountingRegion
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.serving import serving


@dataclass
class Receiver:
    """Takes what it is told, after failing so often."""

    failures: int = 0
    status: int = 500
    taken: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    num_called: int = 0

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/hook", self._hook, methods=["POST"]),
                Route("/moved", self._moved, methods=["POST"]),
            ]
        )

    async def _hook(self, request: Request) -> Response:
        self.num_called += 1
        if self.num_called <= self.failures:
            return Response(status_code=self.status)
        self.taken.append((dict(request.headers), await request.body()))
        return Response()

    async def _moved(self, request: Request) -> Response:
        self.num_called += 1
        return RedirectResponse("/hook", 307)

    async def wait_taken(self) -> None:
        with anyio.fail_after(20):
            while not self.taken:
                await anyio.sleep(0.02)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "AFTER_S", (0.1, 0.1, 0.1))
    monkeypatch.setattr(webhooks, "POLL_S", 0.05)


@pytest.fixture
def edge_settings(tmp_path: Path) -> dict[str, Any]:
    return {"store": tmp_path / "store.sqlite", "allow_private_webhooks": True}


async def secret(edge: EdgeClient) -> str:
    answer = await edge.http.get(f"{edge.ai}/webhooks/secret", headers=edge.headers())
    return str(answer.json()["result"]["secret"])


@pytest.mark.parametrize("failures", [0, 2])
async def test_the_end_of_a_job_is_told_and_signed(edge: EdgeClient, failures: int) -> None:
    receiver = Receiver(failures=failures)
    async with serving(receiver.app) as url:
        body = {"requests": [asked("A", external_reference="x"), asked("K")]}
        body["webhook"] = f"{url}/hook"  # type: ignore[assignment]
        request_id = (await queue(edge, body)).json()["result"]["request_id"]
        await receiver.wait_taken()
        headers, told = receiver.taken[0]
        client = openai.OpenAI(api_key="none", webhook_secret=await secret(edge))
        client.webhooks.verify_signature(told, headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(told + b" ", headers)
        client.close()
        result = msgspec.json.decode(told)["result"]
        polled = await ended(edge, request_id)
        assert result == polled | {"request_id": request_id, "model": result["model"],
                                   "status": "completed"}  # fmt: skip
        assert headers["webhook-id"] == request_id
        await anyio.sleep(0.3)
        assert receiver.num_called == failures + 1


async def test_the_address_may_be_in_the_query(edge: EdgeClient) -> None:
    receiver = Receiver()
    async with serving(receiver.app) as url:
        where = f"{edge.run_url}?queueRequest=true&webhook={url}/hook"
        await edge.http.post(where, json=asked("A"), headers=edge.headers())
        await receiver.wait_taken()


async def test_it_is_given_up_in_the_end(edge: EdgeClient) -> None:
    receiver = Receiver(failures=100)
    async with serving(receiver.app) as url:
        await queue(edge, asked("A") | {"webhook": f"{url}/hook"})
        with anyio.fail_after(20):
            while receiver.num_called < 4:
                await anyio.sleep(0.02)
        await anyio.sleep(0.5)
        assert receiver.num_called == 4  # once, and three times again


async def test_no_redirect_is_followed(edge: EdgeClient) -> None:
    receiver = Receiver()
    async with serving(receiver.app) as url:
        await queue(edge, asked("A") | {"webhook": f"{url}/moved"})
        with anyio.fail_after(20):
            while receiver.num_called < 2:
                await anyio.sleep(0.02)
        assert receiver.taken == []


async def test_no_receiver_ends_the_edge(edge: EdgeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its URL comes to: other receivers are called."""
    monkeypatch.setattr("edge.queued.checked_url", lambda url, pointer: url)  # as if let in before
    receiver = Receiver()
    async with serving(receiver.app) as url:
        await queue(edge, asked("A") | {"webhook": "http://127.0.0.1:99999/hook"})
        await edge.wait_metric("edgefire_edge_webhook_calls_total", 1, outcome="given_up")
        await queue(edge, asked("A") | {"webhook": f"{url}/hook"})
        await receiver.wait_taken()


def test_the_hooks_of_one_account_make_way_for_anothers(tmp_path: Path) -> None:
    """However many of them were due before."""
    store = Store(tmp_path / "store.sqlite")
    db, _ = store._take()
    rows = [(f"{of} {n}", of, due + n) for of, due in (("many", 0), ("few", 50)) for n in range(3)]
    db.executemany("INSERT INTO hooks VALUES (?, 'http://a/', ?, 0, ?, '', 0)", rows)

    def claimed() -> str:
        hook = webhooks.claim(db, "me", 100.0, 30.0)
        assert hook is not None
        return hook.job

    assert [claimed() for _ in range(4)] == ["many 0", "few 0", "many 1", "few 1"]
    webhooks.settle(db, "few 1", "me", None)
    assert claimed() == "few 2"
    assert claimed() == "many 2"
    assert webhooks.claim(db, "me", 100.0, 30.0) is None
    db.close()


async def test_private_addresses_are_not_called(tmp_path: Path, region: CountingRegion) -> None:
    receiver = Receiver()
    async with (
        edge_over(tmp_path, [region.region], store=tmp_path / "store.sqlite") as edge,
        serving(receiver.app) as url,
    ):
        answer = await queue(edge, asked("A") | {"webhook": f"{url}/hook"})
        await ended(edge, answer.json()["result"]["request_id"])
        await anyio.sleep(1.0)
        assert receiver.num_called == 0


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
     "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1",
     "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "ff02::1"],
)  # fmt: skip
def test_what_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_what_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    ["ftp://a/", "file:///etc/passwd", "a", "", "http://", "http://user:pw@a/", "http://[::1",
     "http://a/" + "x" * 3000, "http://a:99999/", "http://a:-1/"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadField, match="/webhook"):
        checked_url(url, "/webhook")


async def test_names_that_are_slow_to_look_up_keep_no_other_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as those of regions, for which an event loop has but few threads."""
    gate, look_up = threading.Event(), socket.getaddrinfo

    def slow(host: str | bytes, *more: Any, **named: Any) -> Any:
        if host in {"slow.example", b"slow.example"}:
            gate.wait(20)
        return look_up("127.0.0.1", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(partial(target, "http://slow.example/", allow_private=True))
        await anyio.wait_all_tasks_blocked()
        try:
            with anyio.fail_after(3):
                assert await anyio.getaddrinfo("localhost", 80)
        finally:
            gate.set()


@pytest.mark.parametrize("url", ["http://localhost:1/", "http://127.1:80/", "http://[::1]:80/"])
async def test_names_are_looked_up_before(url: str) -> None:
    with pytest.raises((NotPublic, OSError)):
        await target(url, allow_private=False)


async def test_the_call_goes_to_the_address_that_was_looked_at() -> None:
    found = await target("https://127.0.0.1:8443/a?b=c", allow_private=True)
    other = type(found)(httpx2.URL("https://example.com:8443/a?b=c"), "203.0.113.9")
    async with httpx2.AsyncClient(trust_env=False) as client:
        request = other.request(client, b"x", {"a": "b"})
    assert str(request.url) == "https://203.0.113.9:8443/a?b=c"
    assert request.headers["host"] == "example.com:8443"
    assert request.extensions["sni_hostname"] == "example.com"


def test_a_signature_known_by_heart() -> None:
    """From the test vectors of Standard Webhooks' libraries."""
    import base64

    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body, key)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
