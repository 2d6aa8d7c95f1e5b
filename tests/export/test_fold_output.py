"""What a fold leaves at its output and prints: certificate, card, verdict, and the base that was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraover_export.fold.report import FoldCertificate, verdict_of

from support.fold_cases import certificate
from support.make_checkpoint import Made, make_checkpoint
from support.plugin import make_checkpoint_on
from support.refusals import fold
from support.reports import fold_certificate
from support.tiny_hub import save_llama

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


# The sentence at the head of the report


WITHIN = "All 60 matrices are rounded to nearest, within the bound by construction."
LOGITS = "Logits differ by at most 1.2e-5, where rounding explains 3e-5."


@pytest.mark.parametrize(
    ("certificate", "tone", "expected"),
    [
        (
            fold_certificate(),
            "good",
            f"The folded adapter computes what was trained. {WITHIN} {LOGITS} The adapter itself moves them by up to "
            "2.1.",
        ),
        (
            fold_certificate(error=None),
            "good",
            f"A and B are what was trained. {WITHIN} Outputs were not compared; --check-error does that.",
        ),
        (
            fold_certificate("inconclusive", effect=0.0),
            "open",
            f"The fold is right as far as this check can see. {WITHIN} {LOGITS} But the adapter moves no logit at all. "
            "An adapter that does nothing would pass as well.",
        ),
    ],
)
def test_each_verdict_has_its_figures(certificate: FoldCertificate, tone: str, expected: str) -> None:
    verdict = verdict_of(certificate)
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, certificate.verdict, expected)


# The base that it was trained on


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
        assert f"it was trained on that model in {kind}" in text
    assert f"trained on that model in {kind}" in (tmp_path / "out" / "fold.html").read_text()


def test_the_trained_base_is_part_of_the_check_of_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    assert fold(made.path, tmp_path / "out", "--trained-on", "nf4") == 2
    assert "--trained-on needs --check-error" in capsys.readouterr().err
