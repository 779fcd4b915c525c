"""Reading what another program prints, as far as a word."""

from __future__ import annotations

import subprocess


def read_to(program: subprocess.Popen[str], word: str) -> str:
    """Its standard output, up to the line with this word."""
    assert program.stdout
    text = ""
    for line in program.stdout:
        text += line
        if word in line:
            return text
    raise AssertionError(f"ended without {word!r}: {text}")
