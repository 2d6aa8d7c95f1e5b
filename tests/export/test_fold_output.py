"""What a fold leaves at its output and prints, and what `--force` replaces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraover_export.fold.certificate import FoldCertificate
from loraover_export.numerics import rounded_adapter
from loraover_export.numerics.rounding import round_tensor

from support.fold_cases import FILES, certificate
from support.make_checkpoint import Made, make_checkpoint, tree
from support.refusals import fold

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An MPO checkpoint in fp32 on q_proj and v_proj; tests read it only."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


def test_force_replaces_a_folded_adapter_whole(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    (tmp_path / "out" / "stray").write_text("of the older adapter")
    assert fold(made.path, tmp_path / "out") == 2
    assert certificate(tmp_path / "out").dtype == "bf16"
    assert fold(made.path, tmp_path / "out", "--force") == 0
    assert certificate(tmp_path / "out").dtype == "fp32"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fold_that_fails_leaves_the_older_adapter(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    before = tree(tmp_path)
    right = round_tensor
    monkeypatch.setattr(rounded_adapter, "round_tensor", lambda *arguments: 2 * right(*arguments))
    assert fold(made.path, tmp_path / "out", "--force") == 1
    assert tree(tmp_path) == before


def test_force_replaces_folded_adapters_only(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = shutil.copytree(made.path, tmp_path / "out")
    before = tree(tmp_path)
    assert fold(made.path, target, "--force") == 2
    assert str(target) in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_force_spares_the_input(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    inner = shutil.copytree(made.path, tmp_path / "out" / "checkpoint")
    assert fold(inner, tmp_path / "out", "--force") == 2
    assert "holds the input" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--check-error",)], ids=str)
def test_json_is_one_object_on_standard_output(
    options: tuple[str, ...], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold(made.path, tmp_path / "out", "--json", *options) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out" / "fold_certificate.json").read_text())
    assert f"wrote {tmp_path / 'out'}" in err


def test_the_verdict_is_shown(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "fold passed" in out
    assert f"wrote {tmp_path / 'out'}" in out


def test_the_installed_command(made: Made, tmp_path: Path) -> None:
    """It runs in a new process, where nothing has been imported or silenced yet."""
    command = Path(sys.executable).with_name("loraover-export")
    arguments = [str(command), "fold", str(made.path), "-o", str(tmp_path / "out"), "--json", "--check-error"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert FoldCertificate.model_validate_json(done.stdout).passed
    assert "Traceback" not in done.stderr
