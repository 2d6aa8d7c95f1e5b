"""Files that describe an ONNX export, `onnx_report.json` and `swappable.json`, and its text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.show import show_place, show_verdict, undecided
from loraover.adapters.verdict import Certificate, CheckVerdict, ExportVerdict, verdict_on
from loraover.common.errors import CheckpointError
from loraover.common.strict_json import StrictModel, read_json
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table
from loraover_export.requests import OnnxRequest

LAYOUT_FILE = "swappable.json"


class AdapterInput(StrictModel):
    """Input of a graph that takes one A, as (in_features, r), or B, as (r, out_features)."""

    graph: str = Field(description="File name of the graph")
    input: str = Field(description="Name of the input")
    features: int = Field(ge=1, description="in_features of A, or out_features of B")


class SwappableLayout(StrictModel):
    """Contents of `swappable.json`: the LoRA inputs of exported graphs."""

    schema_version: Literal[1] = 1
    base_model: str = Field(description="Folder or hub name of the base model")
    dtype: Literal["fp32", "fp16"] = Field(description="Data type of the LoRA inputs")
    web: bool = Field(default=False, description="Whether the LoRA inputs are required, as onnxruntime-web needs them")
    places: dict[str, AdapterInput] = Field(
        min_length=1, description='Input of each A and B, by its name, such as "model.layers.0.mlp.up_proj.lora_A"'
    )


def read_layout(folder: Path, graphs: Sequence[str]) -> SwappableLayout:
    """Read the LoRA inputs of exported graphs.

    Args:
        folder: Folder of the export.
        graphs: File names of its graphs.

    Raises:
        CheckpointError: No swappable graphs in the folder, or inputs of other graphs.
    """
    layout = read_json(folder / LAYOUT_FILE, SwappableLayout)
    for site, place in layout.places.items():
        if place.graph not in graphs:
            raise CheckpointError(
                f"{folder / LAYOUT_FILE}: places.{site}.graph is {place.graph!r}, expected {' or '.join(graphs)}."
            )
    return layout


ENGINE_FACTOR = 6.0
CHANGE_FACTOR = 2.0


class CaseError(StrictModel):
    """Errors of ONNX Runtime's logits against PyTorch's at one shape."""

    case: str = Field(description="Batch, sequence, cached tokens and padding, in words")
    max_logit: float = Field(description="Largest absolute error of a logit")
    mean_logit: float = Field(description="Mean absolute error of the logits")


class GreedyCheck(StrictModel):
    """Tokens of greedy decoding in ONNX Runtime, through its cache, against PyTorch's."""

    tokens: int = Field(description="Number of tokens compared")
    first_difference: int | None = Field(description="Position of the first token that differs; None if all are equal")
    gap: float | None = Field(
        description="Difference of PyTorch's logits for the two tokens at first_difference; None if all are equal"
    )


class GraphCheck(StrictModel):
    """Outputs of a graph with one adapter, or with none, against the PyTorch reference's."""

    adapter: str | None = Field(description="Name of the adapter; None for the base model")
    compared: Literal["logits", "states", "change"] = Field(
        default="logits",
        description="Quantity compared: logits, hidden states in their place, or the change of the base model's logits "
        "by the adapter",
    )
    cases: list[CaseError] = Field(description="Errors at each shape")
    noise: float = Field(description="Largest logit error that the precision alone causes in PyTorch")
    noise_of: str = Field(description="Comparison that the noise was measured by, in words")
    adapter_effect: float = Field(description="Largest change that the adapter makes to a logit")
    greedy: GreedyCheck | None

    @property
    def quantity(self) -> str:
        """Quantity compared, in words."""
        return {"logits": "logit", "states": "hidden state", "change": "logit change"}[self.compared]

    @property
    def error(self) -> float:
        """Largest error over all shapes; NaN if one is NaN, which no bound accepts."""
        return float(np.max([case.max_logit for case in self.cases]))

    @property
    def bound(self) -> float:
        """Largest allowed error: ENGINE_FACTOR times the noise, or CHANGE_FACTOR times for a change.

        ONNX Runtime and PyTorch round in different orders, so twice the noise is expected; the factor leaves room for
        the spread of maxima over some dozens of positions. Of 150 random models with two layers, the largest error
        was the noise itself in the median and 3.4 times the noise at worst.

        A change is compared in int4 graphs, whose rounding PyTorch repeats: over 48 changes by adapters of 12 random
        models, the error was 0.90 to 1.17 times the noise.
        """
        return (CHANGE_FACTOR if self.compared == "change" else ENGINE_FACTOR) * self.noise

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict on the largest error; inconclusive where an adapter that does nothing would pass as well."""
        greedy = self.greedy
        if greedy is not None and greedy.gap is not None and not greedy.gap <= 2 * self.bound:
            return "failed"
        if self.compared == "change" and self.adapter_effect <= self.bound:
            return "inconclusive"  # one activation that ONNX Runtime rounds to the next level may exceed such a bound
        return verdict_on(self.error, self.bound, math.inf if self.adapter is None else self.adapter_effect)

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == "passed"


class OnnxReport(Certificate):
    """Result of an ONNX export, and the contents of `onnx_report.json`."""

    schema_version: Literal[1] = 1
    verdict: ExportVerdict
    mode: Literal["merged", "swappable"] = Field(description="Whether A and B are in the weights, or inputs")
    precision: Literal["fp32", "fp16", "int4"] = Field(description="Number format of the graph's weights")
    device: Literal["cpu", "cuda"] = Field(description="Device that the graph was built for")
    cache: bool = Field(description="Whether a language model's graph has a KV cache")
    checked_on: str | None = Field(description="Device of ONNX Runtime's checks, cpu or cuda; None without a check")
    web: bool = Field(default=False, description="Whether graph and adapters are for onnxruntime-web")
    check_device: str | None = Field(
        default="cpu", description="Device of PyTorch's checks: cpu, cuda or mps; None without a check"
    )
    compute_dtype: str | None = Field(default="fp32", description="Data type of PyTorch's checks; None without a check")
    base_model: str = Field(description="Folder or hub name of the base model")
    adapters: dict[str, str] = Field(description="Folder of each adapter, by its name")
    checks: list[GraphCheck] = Field(description="Outputs against PyTorch's; empty without a check")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each merged weight, or each A and B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


def export_verdict(checks: Sequence[GraphCheck], matrices: Sequence[MatrixCertificate]) -> ExportVerdict:
    """Return "failed" if anything failed, and "inconclusive" if no check would have noticed an adapter's loss."""
    if not all(matrix.passed for matrix in matrices) or any(check.verdict == "failed" for check in checks):
        return "failed"
    if not checks:
        return "not checked"
    proven = {check.adapter for check in checks if check.passed}
    return "passed" if proven == {check.adapter for check in checks} else "inconclusive"


def show_report(report: OnnxReport, request: OnnxRequest, console: Console) -> None:
    """Print errors and bounds of each adapter, the verdict, and where the files are."""

    def greedy(check: GraphCheck) -> str:
        found = check.greedy
        if found is None:
            return "-"
        if found.first_difference is None:
            return f"{found.tokens} equal"
        return f"{found.first_difference} equal, gap {found.gap:.2g}"

    if report.checks:
        columns: list[Column[GraphCheck]] = [
            Column("adapter", lambda c: f"{c.adapter or 'none'}{' (change)' * (c.compared == 'change')}", "name"),
            Column("error", lambda c: f"{c.error:.1e}"),
            Column("noise", lambda c: f"{c.noise:.1e}"),
            Column("allowed", lambda c: f"{c.bound:.1e}"),
            Column("effect", lambda c: f"{c.adapter_effect:.3g}"),
            Column("greedy tokens", greedy),
        ]
        title = f"ONNX Runtime against the PyTorch reference, {report.compute_dtype} on {report.check_device}"
        caption = "largest errors of logits; effect: the adapter's change of a logit"
        console.print(Table(columns, report.checks, title, caption=caption))
        console.print(f"noise: {report.checks[0].noise_of}")
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "inconclusive":
        print_line(console, undecided("An adapter", "A higher --precision allows a smaller error."))
    show_place(report, request.output, console, reason="an export that fails its check is not kept")
