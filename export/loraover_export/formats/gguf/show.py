"""A report of an export for llama.cpp as text for the terminal."""

from __future__ import annotations

import shlex

from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.show import in_one_line, show_left_out, show_place, show_verdict, undecided
from loraover.reporting.reporter import print_line
from loraover_export.formats.gguf.report import GgufCheck, GgufReport
from loraover_export.requests import GgufRequest


def show_report(report: GgufReport, request: GgufRequest, console: Console) -> None:
    """Print the certificate, the check, the verdict, and how to run the adapter if it was written."""
    facts = in_one_line(matrix_facts(report.matrices))
    print_line(console, f"{report.family}, rank {report.rank}, {report.dtype}, {facts}")
    show_left_out(report.left_out, console)
    if report.check is not None:
        _show_check(report.check, console)
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "not checked":
        print_line(console, "llama.cpp was not run; --base-gguf FILE compares its logits with PyTorch's")
    show_place(report, request.output, console, reason="an adapter that fails its check is not kept")
    if report.verdict != "failed":
        print_line(console, f"run it: {shlex.join(['llama-server', '-m', 'BASE.gguf', '--lora', str(request.output)])}")


def _show_check(check: GgufCheck, console: Console) -> None:
    print_line(
        console, f"llama.cpp against the PyTorch reference, {check.tokens} tokens, {'/'.join(check.weight_types)}:"
    )
    print_line(console, f"  largest logit error {check.error:.2e}, allowed {check.bound:.2e}")
    print_line(console, f"  base model against base model {check.base_distance:.2e}")
    print_line(console, f"  change that the adapter makes {check.adapter_effect:.3g}")
    if check.verdict == "inconclusive":
        remedy = "A GGUF file of the base model in F32 allows a smaller error; "
        remedy += "if this one is in F32, it holds another model's weights."
        print_line(console, undecided("The adapter", remedy), "yellow")
