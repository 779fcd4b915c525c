from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import infire.__main__ as process
from infire.__main__ import Settings, app

ENGINE = ["serve", "--fd", "3", "--model", "m", "--model-dir", "/models/m"]


@pytest.fixture
def started(monkeypatch) -> list[Settings]:
    """The settings of every engine that a command line starts, without starting it."""
    settings: list[Settings] = []
    monkeypatch.setattr(process, "serve_process", lambda fd, load: load())
    monkeypatch.setattr(process, "load", settings.append)
    return settings


def test_a_flag_wins_over_the_environment_and_that_over_the_file(started, tmp_path: Path) -> None:
    file = tmp_path / "infire.toml"
    file.write_text("[serve]\nkv_tokens = 100\nmax_running = 3\nblock_tokens = 8\n")
    environment = {"INFIRE_KV_TOKENS": "200", "INFIRE_MAX_RUNNING": "4"}
    command = ["--config", str(file), *ENGINE, "--kv-tokens", "300"]
    result = CliRunner().invoke(app, command, env=environment)
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert (settings.kv_tokens, settings.max_running, settings.block_tokens) == (300, 4, 8)
    assert (settings.max_step_tokens, settings.device) == (512, "auto")


def test_threads_are_all_usable_ones_unless_said(started) -> None:
    CliRunner().invoke(app, ENGINE)
    CliRunner().invoke(app, [*ENGINE, "--threads", "3"])
    assert [settings.threads for settings in started] == [process.usable_cpus(), 3]


def test_a_size_of_nothing_is_refused_by_name(started) -> None:
    result = CliRunner().invoke(app, [*ENGINE, "--kv-tokens", "0"])
    assert result.exit_code == 2
    assert "--kv-tokens" in result.output
    assert started == []
