"""A server process that stands in for any of a fleet's, for tests of the launcher.

It is ready at once, and answers a run with the words of ANSWER, one a chunk. Run as a program:
    stand_in.py [BEHAVIOUR...] --fd N
BEHAVIOUR: dies, never-ready, stubborn (no SIGTERM or SIGINT ends it), leaves-a-child, slow (it has
something to do for ever, until it is cut), says-when-told (and when it goes); of an answer:
truncates (it ends early), breaks (so does the connection).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from routing.drain import GRACE_S, Drain
from routing.serving import serve_app

ANSWER = ("It", " scatters", " light", ".")
USAGE = '{"prompt_tokens":7,"completion_tokens":4,"total_tokens":11}'


async def ready(_: Request) -> Response:
    return PlainTextResponse("no", 503) if "never-ready" in sys.argv else PlainTextResponse("yes")


async def run(request: Request) -> Response:
    if request.headers.get("authorization") != "Bearer a-key":
        return JSONResponse({"errors": [{"code": 10000}]}, 401)

    async def events() -> AsyncIterator[str]:
        for word in ANSWER:
            yield f'data: {{"response":"{word}"}}\n\n'
            if "breaks" in sys.argv:
                os._exit(1)
        yield f'data: {{"response":"","usage":{USAGE}}}\n\n'
        if "truncates" not in sys.argv:
            yield "data: [DONE]\n\n"

    headers = {"x-served-by": "weur"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def say_when() -> None:
    print(time.monotonic(), flush=True)


def main() -> None:
    if "dies" in sys.argv:
        sys.exit("no weights here")
    if "leaves-a-child" in sys.argv:
        child = subprocess.Popen(["sleep", "1000"])
        print(f"child {child.pid}", flush=True)
    app = Starlette(
        routes=[Route("/ready", ready), Route("/client/{rest:path}", run, methods=["POST"])]
    )
    if "stubborn" in sys.argv:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    drain = Drain(1e6 if "slow" in sys.argv else GRACE_S)
    drain.num_left = lambda: "slow" in sys.argv
    if "says-when-told" in sys.argv:
        drain.listeners.add(say_when)
    fd = int(sys.argv[sys.argv.index("--fd") + 1])
    serve_app(app, host="127.0.0.1", port=0, fd=fd, drain=drain)
    if "says-when-told" in sys.argv:
        say_when()


if __name__ == "__main__":
    main()
