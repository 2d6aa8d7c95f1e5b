"""The certificate of a fold, its verdict in plain sentences first, as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from loraover.adapters.logits.verdict import POWER, CheckVerdict
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.reporting.figures import Band, FigureRow, Key, Point, rows_figure
from loraover.reporting.html_page import Origin, Page, Table, Verdict, make_page
from loraover.reporting.palette import tone_of
from loraover.reporting.svg import Axis, Figure, Shape, short
from loraover_export.fold.certificate import FoldCertificate, OutputCertificate

HTML_FILE = "fold.html"
TEMPLATE = "fold.html.j2"
WORST_SHOWN = 20
SMALLEST = 1e-12  # a difference of logits that is drawn; smaller ones are at the left end


def to_page(certificate: FoldCertificate, command: str) -> Page:
    """Make the page of a fold; every text is escaped.

    Args:
        certificate: The certificate of a fold that did not fail.
        command: Command line of the fold.
    """
    outputs = certificate.outputs
    logits = [] if outputs is None else [_logits(outputs)]
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Fold: {certificate.verdict}",
        heading="Does the folded adapter compute what was trained?",
        verdict=verdict_of(certificate),
        facts={
            "outputs compared in": None if outputs is None else f"PEFT, {outputs.compute_dtype} on {outputs.device}",
            "base model": certificate.base_model,
            "trained on": None if certificate.trained_base is None else str(certificate.trained_base),
            "stored as": certificate.dtype,
            "trained as": f"{certificate.decomposition}, {certificate.step} steps",
        },
        origin=Origin(command, certificate.date, certificate.hardware, certificate.versions),
        figures=logits,
        outputs=outputs,
        logits=logits,
        outputs_table=None if outputs is None else _outputs_table(outputs),
        matrices_table=_matrices_table(certificate.matrices),
        count=len(certificate.matrices),
    )


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
        sentences.append(_compared(certificate.outputs, certificate.verdict))
    passed = "A and B are" if certificate.outputs is None else "The folded adapter computes"
    start = {
        "passed": f"{passed} what was trained.",
        "inconclusive": "The fold is right as far as this check can see.",
    }[certificate.verdict]
    return Verdict(tone_of(certificate.verdict), certificate.verdict, " ".join([start, *sentences]))


def _compared(outputs: OutputCertificate, verdict: CheckVerdict) -> str:
    effect = outputs.adapter_effect
    text = f"Logits differ by at most {short(outputs.error.max_logit)}, where rounding explains {short(outputs.bound)}"
    if verdict == "inconclusive":
        moved = f"by more than {short(effect)}, less than {POWER:g} times that" if effect else "at all"
        return f"{text}. But the adapter moves no logit {moved}. An adapter that does nothing would pass as well."
    return f"{text}. The adapter itself moves them by up to {short(effect)}."


def _logits(outputs: OutputCertificate) -> Figure:
    """Draw the errors of logits beside the noise of rounding and the effect of the adapter."""
    noise, error = outputs.noise, outputs.error
    largest = _points(noise.max_logit, error.max_logit, outputs.adapter_effect)
    mean = _points(noise.mean_logit, error.mean_logit)
    note = f"{short(error.max_logit)}, allowed {short(outputs.bound)}"
    rows = [
        FigureRow("largest logit difference", note, largest, bands=[Band(SMALLEST / 10, outputs.bound)]),
        FigureRow("mean logit difference", short(error.mean_logit), mean),
    ]
    keys: list[Key] = [
        ("folded adapter", "subject", "circle"),
        ("noise of rounding", "noise", "diamond"),
        ("allowed", "good", None),
        ("the adapter's effect", "effect", "bar"),
    ]
    shown = [*(point.value for point in largest + mean), max(outputs.bound, SMALLEST)]
    axis = Axis.around("difference of logits from the unfolded model", shown, is_log=True)
    return rows_figure("logits", "Logits of the folded adapter and of the unfolded model", rows, axis, keys=keys)


def _points(*values: float) -> list[Point]:
    """Points of the noise, the folded adapter and the adapter's effect, as many as there are values."""
    forms: list[tuple[str, Shape]] = [("noise", "diamond"), ("subject", "circle"), ("effect", "bar")]
    return [Point(max(value, SMALLEST), *form) for value, form in zip(values, forms, strict=False)]


def _outputs_table(outputs: OutputCertificate) -> Table:
    rows = [
        (
            label,
            *(short(value, ".2e") for value in (d.max_logit, d.mean_logit, d.max_kl, d.mean_kl)),
            f"{100 * d.top1_agreement:.2f} %",
        )
        for label, d in (("folded adapter", outputs.error), ("noise of rounding", outputs.noise))
    ]
    columns = ("compared with the unfolded model", "max logit", "mean logit", "max KL", "mean KL", "same top token")
    return Table(columns, rows, columns[:1], columns[:1])


def _matrices_table(matrices: Sequence[MatrixCertificate]) -> Table:
    worst = sorted(matrices, key=lambda matrix: -matrix.relative_error)[:WORST_SHOWN]
    rows = [
        (
            *(m.name, f"{m.shape[0]} x {m.shape[1]}", "cores" if m.over_parameterised else "plain"),
            *("yes" if m.worst_to_bound <= 1 else "no", short(m.relative_error, ".2e"), short(m.relative_bound, ".2e")),
            *(f"{m.flushed_to_zero:,}", f"{m.subnormal:,}"),
        )
        for m in worst
    ]
    columns = (
        *("matrix", "shape", "trained as", "in bound", "relative error", "relative bound"),
        *("became zero", "subnormal"),
    )
    return Table(columns, rows, ("matrix", "trained as", "in bound"), ("matrix",))
