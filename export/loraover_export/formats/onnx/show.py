"""An ONNX report as a table for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.show import show_place, show_verdict, undecided
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table
from loraover_export.formats.onnx.report import GraphCheck, OnnxReport
from loraover_export.requests import OnnxRequest

CAPTION = "largest errors of logits; effect: the adapter's change of a logit"


def show_report(report: OnnxReport, request: OnnxRequest, console: Console) -> None:
    """Print errors and bounds of each adapter, the verdict, and where the files are."""
    if report.checks:
        heads = ("adapter", "error", "noise", "allowed", "effect", "greedy tokens")
        rows = [
            (
                (check.adapter or "none") + (" (change)" if check.compared == "change" else ""),
                *(f"{value:.1e}" for value in (check.error, check.noise, check.bound)),
                *(f"{check.adapter_effect:.3g}", _greedy(check)),
            )
            for check in report.checks
        ]
        title = f"ONNX Runtime against the PyTorch reference, {report.compute_dtype} on {report.check_device}"
        console.print(terminal_table(heads, rows, names=heads[:1], title=title, caption=CAPTION))
        console.print(f"noise: {report.checks[0].noise_of}")
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "inconclusive":
        print_line(console, undecided("An adapter", "A higher --precision allows a smaller error."))
    show_place(report, request.output, console, reason="an export that fails its check is not kept")


def _greedy(check: GraphCheck) -> str:
    greedy = check.greedy
    if greedy is None:
        return "-"
    if greedy.first_difference is None:
        return f"{greedy.tokens} equal"
    return f"{greedy.first_difference} equal, gap {greedy.gap:.2g}"
