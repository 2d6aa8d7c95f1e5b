"""`loraover compare` shows finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.training.run_result import RunResult

from support.train_command import METHODS
from support.trained_run import Trained

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


def test_compare_shows_runs_side_by_side(
    trained: dict[tuple[str, str], Trained], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    runs = [trained["llama", method] for method in METHODS]
    assert run(cli, ["compare", *(str(r.folder) for r in runs)]) == 0
    printed = capsys.readouterr().out
    rows = {line.strip().split("  ")[0]: line for line in printed.splitlines() if line.strip()}
    for one in runs:
        assert str(one.folder) in printed
        assert f"{one.result.added_parameters:,}" in rows["parameters added while training"]
        assert str(one.result.after) in rows["after"]
    assert rows["method"].split()[1:] == list(METHODS)
    assert run(cli, ["compare", "--json", *(str(r.folder) for r in runs)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path: RunResult.model_validate(values) for path, values in printed.items()} == {
        str(r.folder): r.result for r in runs
    }


def test_compare_refuses_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in ((None, "run.json"), ({"schema_version": 99}, "schema_version")):
        if content is not None:
            (tmp_path / "run.json").write_text(json.dumps(content))
        assert run(cli, ["compare", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
