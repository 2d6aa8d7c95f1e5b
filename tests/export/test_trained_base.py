"""`fold --trained-on`: an adapter that was trained on a 4-bit base is compared on that base and on the full one."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fold_cases import certificate
from support.make_checkpoint import make_checkpoint
from support.plugin import make_checkpoint_on
from support.refusals import fold
from support.tiny_hub import save_llama

pytestmark = pytest.mark.process


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fold_tells_how_far_the_served_base_is_from_the_trained_one(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = save_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)  # on a CPU, nf4 needs 64 columns
    make_checkpoint_on(wide, checkpoint := tmp_path / "checkpoint")
    assert fold(checkpoint, tmp_path / "out", "--check-error", "--trained-on", kind) == 0
    found = certificate(tmp_path / "out").trained_base
    assert found is not None
    assert found.quantization == kind
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert 10 * outputs.error.max_logit < found.difference.max_logit < 10 * outputs.adapter_effect
    assert found.bases.max_logit > 0
    for text in (capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()):
        assert f"it was trained on {kind} of it" in text
    assert f"trained on {kind} of it" in (tmp_path / "out" / "fold.html").read_text()


def test_the_trained_base_is_part_of_the_check_of_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    assert fold(made.path, tmp_path / "out", "--trained-on", "nf4") == 2
    assert "--trained-on needs --check-error" in capsys.readouterr().err
