"""The README's layout is the one that is packed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import unweight
from unweight.strips import MAX_EXCEPTION_SHARE, MAX_SIZE_SHARE, U12Strips, pack_u12, unpack_u12

README = (Path(unweight.__path__[0]) / "README.md").read_text()


def fenced(name: str) -> list[str]:
    found = re.search(rf"```{name}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has a block named {name}"
    return found[1].splitlines()


def weights() -> NDArray[np.uint16]:
    return np.array([[int(word, 16) for word in row.split()] for row in fenced("weights")], "<u2")


def dump(strips: U12Strips) -> list[str]:
    """Lines of 16 bytes of data that are not all zero, and the other arrays whole."""
    rows = {f"data[{start}]": strips.data[start : start + 16] for start in range(0, 192, 16)}
    lines = {name: row.tobytes() for name, row in rows.items() if row.any()}
    lines |= {name: getattr(strips, name).tobytes() for name in ("base", "ptr", "exceptions")}
    return [f"{name:<13}{octets.hex(' ')}" for name, octets in lines.items()]


def test_the_worked_example_is_what_is_packed() -> None:
    strips = pack_u12(weights(), max_exception_share=1, max_size_share=2)
    assert dump(strips) == fenced("u12")
    assert np.array_equal(unpack_u12(strips), weights())


def test_the_worked_example_is_the_weights_it_says() -> None:
    values = (weights().astype(np.uint32) << 16).view(np.float32)
    written = [[1.5, -0.75, -0.0, 3], [0.1, 3, 1e-30, 0.25]]
    np.testing.assert_allclose(values, written, rtol=2**-8)


def test_the_limits_are_those_in_force() -> None:
    assert f"over {MAX_EXCEPTION_SHARE * 100:g} % of exceptions" in README
    assert f"over {MAX_SIZE_SHARE * 100:g} % of" in README


def test_every_file_is_listed() -> None:
    folder = Path(unweight.__path__[0])
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", README, re.MULTILINE))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert listed == {name for name in files if not name.endswith("__init__.py")}


def test_every_command_is_told() -> None:
    from unweight.__main__ import app

    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names == set(re.findall(r"^unweight (\w+)", README, re.MULTILINE))


def test_names_of_errors_are_those_there_are() -> None:
    from unweight import bundle, safetensors_header

    classes = {**vars(bundle), **vars(safetensors_header)}
    kinds = {
        name for name, kind in classes.items()
        if isinstance(kind, type) and issubclass(kind, safetensors_header.BadFile)
    }  # fmt: skip
    assert {name for name in kinds if f"`{name}`" not in README} == set()
