"""Engine processes that misbehave, for tests of what a worker makes of them.

    odd_engine.py BEHAVIOUR ... --fd N

BEHAVIOUR: dies (says hello, then exits with code 3), babbles (after hello, what is no frame),
breaks (says after hello why it must stop), never-loads (says only that), stubborn (does not end
when its socket closes). Other flags are ignored.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infire.notes import Broken
from infire.serve import Peer
from tests.fakes.counting_engine import counting_engine


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    peer = Peer(sock)
    behaviour = sys.argv[1]
    if behaviour != "never-loads":
        peer.send_nowait(counting_engine()[0])
    if behaviour in {"breaks", "never-loads"}:
        peer.send_nowait(Broken("the weights are of another model"))
    if behaviour == "babbles":
        sock.sendall(b"\x03\0\0\0abc")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if behaviour == "dies":
        sys.exit(3)
    peer.wait(1000)  # until the worker closes its end


if __name__ == "__main__":
    main()
