"""The verdict of a fold in plain sentences with its figures."""

from __future__ import annotations

from collections.abc import Sequence

from loraover.reporting.html_page import Tone, Verdict
from loraover.reporting.svg import short
from loraover_export.fold.certificate import POWER, CheckVerdict, FoldCertificate, OutputCertificate
from loraover_export.numerics.matrix_certificate import MatrixCertificate

TONES: dict[CheckVerdict, Tone] = {"passed": "good", "failed": "bad", "inconclusive": "open"}


def verdict_of(certificate: FoldCertificate) -> Verdict:
    """Return whether the folded adapter computes what was trained, with the figures that decide.

    Args:
        certificate: the certificate of the fold.
    """
    sentences = [_matrices(certificate.matrices)]
    if certificate.outputs is None:
        sentences.append("Outputs were not compared; --check-error does that.")
    else:
        sentences.append(_outputs(certificate.outputs, certificate.verdict))
    start = {
        "passed": "The folded adapter computes what was trained.",
        "failed": "The folded adapter does not compute what was trained.",
        "inconclusive": "The fold is right as far as this check can see.",
    }[certificate.verdict]
    return Verdict(TONES[certificate.verdict], certificate.verdict, " ".join([start, *sentences]))


def _matrices(matrices: Sequence[MatrixCertificate]) -> str:
    worst = max(matrices, key=lambda matrix: matrix.worst_to_bound)
    beyond = sum(not matrix.passed for matrix in matrices)
    if beyond:
        return (
            f"{beyond} of {len(matrices)} matrices have an element beyond its rounding bound; the worst error is "
            f"{worst.worst_to_bound:.3g} times its bound, in {worst.name}."
        )
    return (
        f"All {len(matrices)} matrices are within their rounding bounds; the largest error is "
        f"{100 * worst.worst_to_bound:.1f} % of its bound."
    )


def _outputs(outputs: OutputCertificate, verdict: CheckVerdict) -> str:
    error, bound, effect = outputs.error.max_logit, outputs.bound, outputs.adapter_effect
    text = f"Logits differ by at most {short(error)}, where rounding explains {short(bound)}"
    if not error <= bound:
        return f"{text}."
    if verdict == "inconclusive":
        moved = f"by more than {short(effect)}, less than {POWER:g} times that" if effect else "at all"
        return f"{text}, but the adapter moves no logit {moved}, so an adapter that does nothing would pass as well."
    return f"{text} and the adapter itself moves them by up to {short(effect)}."
