"""Contents of `merge_certificate.json`, the proof of a merge, and their text for the terminal."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.show import in_one_line, show_place, show_verdict
from loraover.adapters.uniform.certificate import SourceRecord
from loraover.adapters.verdict import Certificate
from loraover.common.strict_json import StrictModel
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table
from loraover_export.merge.arithmetic import RoundingLoss
from loraover_export.requests import MergeRequest


class MergedWeight(StrictModel):
    """Weight to which a delta was added."""

    matrix: MatrixCertificate = Field(description="Error of the written weight against W + delta_W in float64")
    dtype: str = Field(description="Data type of the weight, as safetensors spells it, such as BF16")
    delta_to_weight: float = Field(description="Frobenius norm of delta_W over that of W + delta_W")
    stored: RoundingLoss = Field(description="What rounding to that data type lost of delta_W")
    four_bit: RoundingLoss = Field(
        description="What a 4-bit quantiser (NF4, one scale for 64 elements) would lose of delta_W, measured on at "
        "most 256 rows of the weight"
    )


class MergeReport(Certificate):
    """Result of a merge, and the contents of `merge_certificate.json`."""

    verdict: Literal["passed", "failed"]
    base_model: str = Field(description="Folder or hub name of the base model")
    revision: str | None = Field(description="Commit of the base model on the hub; None for folders")
    source: SourceRecord = Field(description="Adapter that was merged")
    tensors: int = Field(description="Number of tensors in the merged model's files")
    replaced: list[str] = Field(description="Parameters that the adapter holds in full, and that replace the base's")
    untied: list[str] = Field(description="Weights that shared one tensor in the base model, and no longer do")
    stored: RoundingLoss = Field(description="What rounding to the storage type lost of all deltas together")
    four_bit: RoundingLoss = Field(description="What a 4-bit quantiser would lose of all deltas together")
    weights: list[MergedWeight] = Field(description="One entry for each weight to which a delta was added")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


WORST_SHOWN = 12


def show_merge(report: MergeReport, request: MergeRequest, console: Console) -> None:
    """Print the weights that lost most of their delta, the totals, the verdict, and where the model is."""
    worst = sorted(report.weights, key=lambda weight: -weight.stored.error)[:WORST_SHOWN]
    columns: list[Column[MergedWeight]] = [
        Column("weight", lambda w: w.matrix.name, "name"),
        Column("dtype", lambda w: w.dtype),
        Column("delta\n/ W", lambda w: f"{w.delta_to_weight:.1e}"),
        Column("erased", lambda w: f"{w.stored.erased:.2%}"),
        Column("error", lambda w: f"{w.stored.error:.1%}"),
        Column("4-bit\nerased", lambda w: f"{w.four_bit.erased:.2%}"),
        Column("4-bit\nerror", lambda w: f"{w.four_bit.error:.1%}"),
    ]
    title = f"Largest losses of the adapter, {len(worst)} of {len(report.weights)} weights"
    caption = "Erased: share of the delta's squared norm in elements that stay. Error: relative to the delta's norm."
    console.print(Table(columns, worst, title, caption=caption))
    dtypes = ", ".join(sorted({weight.dtype for weight in report.weights}))
    print_line(
        console,
        f"rounding to {dtypes} erased {report.stored.erased:.2%} of the adapter (squared norm in elements that stay as "
        f"they were), with an error of {report.stored.error:.1%} of its norm",
    )
    print_line(
        console,
        f"a 4-bit quantiser (NF4) would erase {report.four_bit.erased:.2%}, with an error of "
        f"{report.four_bit.error:.1%} of the adapter's norm; up to 256 rows of each weight were tried",
    )
    if report.untied:
        print_line(console, f"no longer tied: {', '.join(report.untied)}")
    facts = in_one_line(matrix_facts([weight.matrix for weight in report.weights]))
    show_verdict(report, f"merge {report.verdict}: {facts}", console)
    show_place(report, request.output, console, reason="a weight failed its check")
