"""An ONNX report as a table for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.show import show_place, show_verdict, undecided
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table
from loraover_export.formats.onnx.report import GraphCheck, OnnxReport
from loraover_export.requests import OnnxRequest


def show_report(report: OnnxReport, request: OnnxRequest, console: Console) -> None:
    """Print errors and bounds of each adapter, the verdict, and where the files are."""
    if report.checks:
        console.print(_checks_table(report))
        console.print(f"noise: {report.checks[0].noise_of}")
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "inconclusive":
        print_line(console, undecided("An adapter", "A higher --precision allows a smaller error."))
    show_place(report, request.output, console, reason="an export that fails its check is not kept")


def _checks_table(report: OnnxReport) -> Table[GraphCheck]:
    def greedy(check: GraphCheck) -> str:
        found = check.greedy
        if found is None:
            return "-"
        if found.first_difference is None:
            return f"{found.tokens} equal"
        return f"{found.first_difference} equal, gap {found.gap:.2g}"

    return Table(
        [
            Column("adapter", lambda c: f"{c.adapter or 'none'}{' (change)' * (c.compared == 'change')}", "name"),
            Column("error", lambda c: f"{c.error:.1e}"),
            Column("noise", lambda c: f"{c.noise:.1e}"),
            Column("allowed", lambda c: f"{c.bound:.1e}"),
            Column("effect", lambda c: f"{c.adapter_effect:.3g}"),
            Column("greedy tokens", greedy),
        ],
        report.checks,
        f"ONNX Runtime against the PyTorch reference, {report.compute_dtype} on {report.check_device}",
        caption="largest errors of logits; effect: the adapter's change of a logit",
    )
