"""The rules no linter has, and the import contracts, which have one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("edge", "origin_gpu", "infire", "unweight", "routing", "loadtest")
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
IMPORT_LOCUST = {"loadtest/locustfile.py", "loadtest/users.py"}
MAX_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of what a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def reads_environment(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in {"environ", "environb", "getenv"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    assert text.count("\n") <= MAX_LINES, "look for the second noun in it"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, "a package file holds its docstring and nothing else"
    if path.name != "__main__.py":
        assert not reads_environment(tree), "only __main__.py reads the environment"
    if name_of(path) not in IMPORT_LOCUST:
        assert not imported(tree) & {"locust", "gevent", "geventhttpclient"}


def test_what_the_readme_maps_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = re.findall(r"^\| `([\w/]+/)` \|", readme, re.MULTILINE)
    assert {folder.rstrip("/") for folder in folders} >= {*PACKAGES, "tests"}
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert [name for name in (*folders, *links) if not (ROOT / name).exists()] == []


def test_packages_import_one_way() -> None:
    """In a process of its own: import-linter's configuration of logging would silence ours."""
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    words = [sys.executable, "-c", command, "--no-cache"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
