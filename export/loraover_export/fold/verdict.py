"""The verdict of a fold in plain sentences with its figures."""

from __future__ import annotations

from loraover.reporting.html_page import Verdict
from loraover.reporting.palette import tone_of
from loraover.reporting.svg import short
from loraover_export.fold.certificate import FoldCertificate, OutputCertificate
from loraover_export.logits.judge import POWER, CheckVerdict


def verdict_of(certificate: FoldCertificate) -> Verdict:
    """Return whether the folded adapter computes what was trained, with the figures that decide.

    Args:
        certificate: The certificate of a fold that did not fail.
    """
    count = len(certificate.matrices)
    sentences = [f"All {count} matrices are rounded to nearest, within the bound by construction."]
    if certificate.outputs is None:
        sentences.append("Outputs were not compared; --check-error does that.")
    else:
        sentences.append(_outputs(certificate.outputs, certificate.verdict))
    start = {
        "passed": "The folded adapter computes what was trained.",
        "inconclusive": "The fold is right as far as this check can see.",
    }[certificate.verdict]
    return Verdict(tone_of(certificate.verdict), certificate.verdict, " ".join([start, *sentences]))


def _outputs(outputs: OutputCertificate, verdict: CheckVerdict) -> str:
    effect = outputs.adapter_effect
    text = f"Logits differ by at most {short(outputs.error.max_logit)}, where rounding explains {short(outputs.bound)}"
    if verdict == "inconclusive":
        moved = f"by more than {short(effect)}, less than {POWER:g} times that" if effect else "at all"
        return f"{text}. But the adapter moves no logit {moved}. An adapter that does nothing would pass as well."
    return f"{text}. The adapter itself moves them by up to {short(effect)}."
