"""The certificate of a fold, on a terminal too, and as one HTML page that needs no network, with its verdict first."""

from __future__ import annotations

from importlib.resources import files

from pydantic import Field
from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, underflow_facts
from loraover.adapters.show import OTHER_TEXTS, deviations_table, show_place, show_verdict, undecided
from loraover.adapters.verdict import NOISE_FACTOR, POWER, Certificate, CheckVerdict, Deviation, verdict_on
from loraover.common.strict_json import StrictModel
from loraover.reporting.figures import Band, FigureRow, Key, Point, rows_figure
from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.palette import tone_of
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import Axis, Figure, Shape, short
from loraover.reporting.table import Column, Table
from loraover_export.requests import FoldRequest

HTML_FILE = "fold.html"

TEMPLATE = "fold.html.j2"

ON_TERMINAL, ON_PAGE = 8, 20
"""Numbers of matrices that are shown, those with the largest errors."""

SMALLEST = 1e-12  # a difference of logits that is drawn; smaller ones are at the left end


class OutputCertificate(StrictModel):
    """Outputs of the folded adapter, as PEFT loads it, against the unfolded model's.

    The yardstick is the noise of rounding: the distance between *twins*, adapters whose elements were rounded at
    random to one of the two neighbouring numbers.
    """

    base: str = Field(description="Base model that was run, in words")
    device: str = Field(description="Device that the models ran on: cpu, cuda, one GPU such as cuda:1, or mps")
    compute_dtype: str = Field(description="Data type that the models ran in: fp32, bf16, fp16 or fp64")
    prompts: int = Field(description="Number of prompts")
    tokens: int = Field(description="Number of tokens in all prompts")
    compared_tokens: int = Field(
        description="Number of these tokens at which every layer applied its cores; where cores are too large to be "
        "applied at all tokens, the others went through the folded A and B"
    )
    prompt_source: str = Field(description="Where the prompts come from, in words")
    error: Deviation = Field(description="Distance of the folded adapter from the unfolded model")
    noise: Deviation = Field(description="Largest distance between any two twins")
    twins: int = Field(description="Number of twins; each also has its ranks in another order")
    adapter_effect: float = Field(description="Largest change of a logit that the adapter makes to the base model")

    @property
    def bound(self) -> float:
        """Largest allowed logit error: NOISE_FACTOR times the noise.

        Two twins differ by two random roundings, each of twice the variance of one rounding to nearest, so about half
        of their noise is expected; the factor leaves room for the spread of maxima and for the other arithmetic of
        the unfolded model.
        """
        return NOISE_FACTOR * self.noise.max_logit

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict on the largest logit error."""
        return verdict_on(self.error.max_logit, self.bound, self.adapter_effect)

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == "passed"


class TrainedBase(StrictModel):
    """The folded adapter on the base model as it was quantised in training, and on the full one."""

    quantization: str = Field(description="How bitsandbytes quantised the base model in training: nf4 or int8")
    served: str = Field(description="Base model that the adapter names and engines load, in full precision, in words")
    difference: Deviation = Field(description="Distance of the adapter on the quantised base from it on the full one")
    bases: Deviation = Field(description="Distance of the quantised base from the full one, both without an adapter")

    def __str__(self) -> str:
        return (
            f"Engines will serve the adapter on {self.served} in full precision, but it was trained on that model in "
            f"{self.quantization}. Between the two, its logits differ by up to {self.difference.max_logit:.2g} "
            f"(mean KL {self.difference.mean_kl:.2g} nats, {self.difference.top1_agreement:.1%} same top-1); without "
            f"the adapter by up to {self.bases.max_logit:.2g} (mean KL {self.bases.mean_kl:.2g} nats)."
        )


class FoldCertificate(Certificate):
    """Result of a fold, and the contents of `fold_certificate.json`."""

    verdict: CheckVerdict
    base_model: str | None = Field(description="Base model that the adapter names; None if it names none")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    decomposition: str = Field(description="Tensor network that the matrices were trained as")
    step: int = Field(description="Optimizer steps that the checkpoint was trained for")
    seed: int | None = Field(description="Seed of the random draws in training's cores; None: the run's, or 0")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and B")
    outputs: OutputCertificate | None = Field(description="Check of the outputs; None if it was not asked for")
    trained_base: TrainedBase | None = Field(
        None, description="The adapter on the base as quantised in training and on the full one; None: not asked for"
    )
    output_bound: float | None = Field(description="Largest allowed logit error; None without a check of the outputs")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")
    date: str = Field(description="Day of the fold, in UTC")


def show_certificate(certificate: FoldCertificate, request: FoldRequest, console: Console) -> None:
    """Print the worst matrices, the check of the outputs, the verdict, and where the adapter is."""
    console.print(_matrices_table(certificate, ON_TERMINAL))
    for fact in underflow_facts(certificate.matrices).values():
        console.print(f"{certificate.dtype} range: {fact}", soft_wrap=True)
    if (outputs := certificate.outputs) is not None:
        console.print(_outputs_table(outputs))
        allowed = f"max logit error {outputs.error.max_logit:.2e}, allowed {outputs.bound:.2e}"
        effect = f"the adapter itself moves logits by up to {outputs.adapter_effect:.3g}"
        console.print(f"{allowed}; {effect}", soft_wrap=True)
        if outputs.compared_tokens < outputs.tokens:
            console.print(
                f"Cores were applied at {outputs.compared_tokens} of {outputs.tokens} tokens, the same in every layer: "
                "they are too large to be applied at all tokens.",
                soft_wrap=True,
            )
    if certificate.trained_base is not None:
        print_line(console, str(certificate.trained_base))
    show_verdict(certificate, f"fold {certificate.verdict}", console)
    if certificate.verdict == "inconclusive":
        print_line(console, undecided("The matrices are within their bounds, but the adapter", OTHER_TEXTS))
    show_place(certificate, request.output, console, reason="an adapter that fails its check is not kept")


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
        matrices_table=_matrices_table(certificate, ON_PAGE),
    )


def verdict_of(certificate: FoldCertificate) -> Verdict:
    """Return whether the folded adapter computes what was trained, with the figures that decide.

    Args:
        certificate: The certificate of a fold that did not fail.
    """
    count = len(certificate.matrices)
    sentences = [f"All {count} matrices are rounded to nearest, within the bound by construction."]
    if (outputs := certificate.outputs) is None:
        sentences.append("Outputs were not compared; --check-error does that.")
    else:
        error, bound, effect = (short(n) for n in (outputs.error.max_logit, outputs.bound, outputs.adapter_effect))
        sentences.append(f"Logits differ by at most {error}, where rounding explains {bound}.")
        if certificate.verdict == "inconclusive":
            moved = f"by more than {effect}, less than {POWER:g} times that" if outputs.adapter_effect else "at all"
            sentences.append(
                f"But the adapter moves no logit {moved}. An adapter that does nothing would pass as well."
            )
        else:
            sentences.append(f"The adapter itself moves them by up to {effect}.")
    passed = "A and B are" if certificate.outputs is None else "The folded adapter computes"
    start = {
        "passed": f"{passed} what was trained.",
        "inconclusive": "The fold is right as far as this check can see.",
    }[certificate.verdict]
    return Verdict(tone_of(certificate.verdict), certificate.verdict, " ".join([start, *sentences]))


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


def _outputs_table(outputs: OutputCertificate) -> Table[tuple[str, Deviation]]:
    where = f"{outputs.compute_dtype} on {outputs.device}"
    title = f"Folded against unfolded: {outputs.prompt_source}, {outputs.tokens} tokens, {where}"
    return deviations_table(
        [("folded adapter", outputs.error), ("noise of rounding", outputs.noise)], title, "distance of"
    )


def _matrices_table(certificate: FoldCertificate, most: int) -> Table[MatrixCertificate]:
    matrices = certificate.matrices
    worst = sorted(matrices, key=lambda m: (m.passed, -m.relative_error))[:most]
    return Table(
        [
            Column("matrix", lambda m: m.name, "name"),
            Column("shape", lambda m: f"{m.shape[0]} x {m.shape[1]}"),
            Column("trained as", lambda m: "cores" if m.over_parameterised else "plain", "word", is_wide=True),
            Column("in bound", lambda m: "yes" if m.worst_to_bound <= 1 else "no", "word", is_wide=True),
            Column("rel. error", lambda m: short(m.relative_error, ".2e")),
            Column("bound", lambda m: short(m.relative_bound, ".2e")),
            Column("became zero", lambda m: f"{m.flushed_to_zero:,}", is_wide=True),
            Column("subnormal", lambda m: f"{m.subnormal:,}", is_wide=True),
        ],
        worst,
        f"Largest errors, {len(worst)} of {len(matrices)} matrices, stored as {certificate.dtype}",
        "Errors and bounds are Frobenius norms over that of the matrix. Each element has a bound as well, for the "
        "product and its rounding, and its error is within it. fold_certificate.json has every matrix.",
        "rounded to nearest, within the bound by construction" if all(m.passed for m in matrices) else "",
    )
