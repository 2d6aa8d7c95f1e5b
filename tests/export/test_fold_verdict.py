"""The sentence at the head of a fold's report, for every verdict."""

from __future__ import annotations

import pytest

from loraover_export.fold.certificate import FoldCertificate
from loraover_export.fold.html import verdict_of

from support.reports import fold_certificate

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
            f"The folded adapter computes what was trained. {WITHIN} Outputs were not compared; --check-error does "
            "that.",
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
