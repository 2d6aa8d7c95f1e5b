"""What a fold leaves at its output and prints, and what `--force` replaces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.fold_cases import FILES, certificate
from support.make_checkpoint import Made, make_checkpoint
from support.refusals import Refused, fold

pytestmark = pytest.mark.process


def test_force_replaces_a_folded_adapter_whole(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    (tmp_path / "out" / "stray").write_text("of the older adapter")
    assert fold(made.path, tmp_path / "out") == 2
    assert certificate(tmp_path / "out").dtype == "bf16"
    assert fold(made.path, tmp_path / "out", "--force") == 0
    assert certificate(tmp_path / "out").dtype == "fp32"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_folded_adapters_only(made: Made, tmp_path: Path, refused: Refused) -> None:
    target = shutil.copytree(made.path, tmp_path / "out")
    refused("fold", made.path, "--force", output=target, named=(str(target),))


@pytest.mark.parametrize("options", [(), ("--check-error",)], ids=str)
def test_json_is_one_object_on_standard_output(
    options: tuple[str, ...], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold(made.path, tmp_path / "out", "--json", *options) == 0
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
