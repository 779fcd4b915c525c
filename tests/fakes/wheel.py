"""A wheel with one data file, as a package index would have it."""

from __future__ import annotations

import zipfile
from pathlib import Path

_METADATA = """\
Metadata-Version: 2.1
Name: {name}
Version: {version}
Requires-Dist: there-is-no-such-package
"""
_WHEEL = """\
Wheel-Version: 1.0
Root-Is-Purelib: true
Tag: py3-none-any
"""


def write_wheel(folder: Path, file: Path, *, name: str, version: str) -> Path:
    """Write the wheel of `name`, which holds `file` under data/, into `folder`."""
    about = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(file, f"{name}/data/{file.name}")
        packed.writestr(f"{about}/METADATA", _METADATA.format(name=name, version=version))
        packed.writestr(f"{about}/WHEEL", _WHEEL)
        packed.writestr(f"{about}/RECORD", "")
    return wheel
