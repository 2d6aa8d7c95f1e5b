from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from loraover.common.command_line import run
from loraover_serve.cli import cli


def test_engines_reports_the_installed_peft(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["engines", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["PyTorch with PEFT"] == version("peft")


def test_engines_tells_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraover_serve.engines.installed.installed_version", lambda names: None)
    assert run(cli, ["engines"]) == 0
    assert "pip install" in " ".join(capsys.readouterr().out.split())
