"""How a server process of the fleet starts on an inherited socket, and stops when told to."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import httpx2
import psutil
import pytest

from routing.serving import address, listening_socket

pytestmark = pytest.mark.system

APP = """
import sys, anyio, logging
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from routing.drain import Drain
from routing.serving import serve_app

left = 0
drain = None
if "--grace-s" in sys.argv:
    drain = Drain(float(sys.argv[sys.argv.index("--grace-s") + 1]))
    drain.num_left = lambda: left

async def hello(request):
    return PlainTextResponse("draining" if drain and drain.begun else "hello")

async def ten(request):
    async def body():
        global left
        left += 1
        for _ in range(10):
            yield b"x"
            await anyio.sleep(0.05)
        left -= 1
    return StreamingResponse(body())

async def endless(request):
    async def body():
        while True:
            yield b"x"
            await anyio.sleep(0.01)
    return StreamingResponse(body())

@asynccontextmanager
async def lifespan(app):
    yield
    if "stubborn" in sys.argv:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(60)

routes = [Route("/", hello), Route("/ten", ten), Route("/endless", endless)]
app = Starlette(routes=routes, lifespan=lifespan)
serve_app(app, host="127.0.0.1", port=0, fd=int(sys.argv[1]), drain=drain)
"""


def start(listener: socket.socket, *words: str) -> subprocess.Popen[bytes]:
    number = listener.fileno()
    command = [sys.executable, "-c", APP, str(number), *words]
    return subprocess.Popen(
        command, pass_fds=[number], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_an_inherited_socket_and_stops_in_time_and_in_silence(number: int) -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        process = start(listener)
        url = address(listener)
        assert httpx2.get(url, timeout=60, trust_env=False).text == "hello"
        with httpx2.stream("GET", f"{url}/endless", timeout=60, trust_env=False) as response:
            assert next(response.iter_bytes())
            told = time.monotonic()
            process.send_signal(number)  # with a request that would never end by itself
            output, _ = process.communicate(timeout=60)
            took_s = time.monotonic() - told
    assert process.returncode == 0
    assert took_s < 5
    assert output == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_begun_ends_and_what_is_asked_meanwhile_is_answered(number: int) -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        process = start(listener, "--grace-s", "60")
        url = address(listener)
        assert httpx2.get(url, timeout=60, trust_env=False).text == "hello"
        with httpx2.stream("GET", f"{url}/ten", timeout=60, trust_env=False) as response:
            pieces = response.iter_bytes()
            text = next(pieces)
            process.send_signal(number)
            while httpx2.get(url, timeout=60, trust_env=False).text != "draining":
                time.sleep(0.005)
            text += b"".join(pieces)
        assert text == b"x" * 10
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, b"")


def test_a_second_signal_waits_for_nothing() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        process = start(listener, "--grace-s", "60")
        url = address(listener)
        assert httpx2.get(url, timeout=60, trust_env=False).text == "hello"
        with httpx2.stream("GET", f"{url}/ten", timeout=60, trust_env=False) as response:
            assert next(response.iter_bytes())
            process.terminate()
            while httpx2.get(url, timeout=60, trust_env=False).text != "draining":
                time.sleep(0.005)
            told = time.monotonic()
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - told < 5


def test_nobody_is_waited_for_with_nothing_to_do() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        process = start(listener, "--grace-s", "600")
        with httpx2.Client(timeout=60, trust_env=False) as client:
            assert client.get(address(listener)).text == "hello"  # and stays connected
            told = time.monotonic()
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - told < 5 * 2


def test_a_process_with_nothing_to_do_sleeps() -> None:
    with listening_socket("127.0.0.1", 0) as listener, start(listener) as process:
        assert httpx2.get(address(listener), timeout=60, trust_env=False).text == "hello"
        switches = psutil.Process(process.pid).num_ctx_switches
        before = switches().voluntary
        time.sleep(2)
        woken = switches().voluntary - before
        process.terminate()
    assert woken < 10  # uvicorn looks ten times a second


@pytest.mark.slow
def test_a_process_that_cannot_stop_is_gone_all_the_same() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        process = start(listener, "stubborn")
        assert httpx2.get(address(listener), timeout=60, trust_env=False).text == "hello"
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - told < 6
    assert b"more than" in output


def test_an_address_is_that_of_the_socket() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address(listener) == f"http://127.0.0.1:{port}"
        with listening_socket("ignored", 0, fd=listener.detach()) as inherited:
            assert inherited.getsockname()[1] == port


def test_an_answer_does_not_wait_for_the_client_to_confirm_its_head() -> None:
    """Nagle's algorithm and delayed acknowledgements would make it 40 ms."""
    with listening_socket("127.0.0.1", 0) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
