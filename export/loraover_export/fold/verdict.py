"""The verdict of a fold in plain sentences with its figures."""

from __future__ import annotations

from collections.abc import Sequence

from loraover.reporting.html_page import Tone, Verdict
from loraover.reporting.svg import short
from loraover_export.fold.certificate import FoldCertificate, OutputCertificate
from loraover_export.logits.judge import POWER, CheckVerdict
from loraover_export.numerics.matrix_certificate import MatrixCertificate

TONES: dict[CheckVerdict, Tone] = {"passed": "good", "inconclusive": "open"}
"""Tone of each verdict that a written fold can have; one that failed leaves no page."""


def verdict_of(certificate: FoldCertificate) -> Verdict:
    """Return whether the folded adapter computes what was trained, with the figures that decide.

    Args:
        certificate: The certificate of a fold that did not fail.
    """
    sentences = [_matrices(certificate.matrices)]
    if certificate.outputs is None:
        sentences.append("Outputs were not compared; --check-error does that.")
    else:
        sentences.append(_outputs(certificate.outputs, certificate.verdict))
    start = {
        "passed": "The folded adapter computes what was trained.",
        "inconclusive": "The fold is right as far as this check can see.",
    }[certificate.verdict]
    return Verdict(TONES[certificate.verdict], certificate.verdict, " ".join([start, *sentences]))


def _matrices(matrices: Sequence[MatrixCertificate]) -> str:
    worst = max(matrices, key=lambda matrix: matrix.worst_to_bound)
    return (
        f"All {len(matrices)} matrices are within their rounding bounds; the largest error is "
        f"{100 * worst.worst_to_bound:.1f} % of its bound."
    )


def _outputs(outputs: OutputCertificate, verdict: CheckVerdict) -> str:
    effect = outputs.adapter_effect
    text = f"Logits differ by at most {short(outputs.error.max_logit)}, where rounding explains {short(outputs.bound)}"
    if verdict == "inconclusive":
        moved = f"by more than {short(effect)}, less than {POWER:g} times that" if effect else "at all"
        return f"{text}, but the adapter moves no logit {moved}, so an adapter that does nothing would pass as well."
    return f"{text} and the adapter itself moves them by up to {short(effect)}."
