"""What a fold leaves at its output and prints, and what `--force` replaces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.make_checkpoint import Made, make_checkpoint
from support.refusals import fold

pytestmark = pytest.mark.process


def test_json_is_one_object_on_standard_output(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out", "--json", "--check-error") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out" / "fold_certificate.json").read_text())
    assert f"wrote {tmp_path / 'out'}" in err


def test_the_verdict_is_shown_and_the_card_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    out = capsys.readouterr().out
    assert "fold passed" in out
    assert f"wrote {tmp_path / 'out'}" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert f'base_model: "{made.base}"' in card
    assert f"loraover export fold {made.path} -o {tmp_path / 'out'} --dtype bf16" in card
    assert "8 of 8 within their bounds" in card
