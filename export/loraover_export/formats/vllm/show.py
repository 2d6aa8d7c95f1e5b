"""An export for vLLM as text for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.show import in_one_line, show_matrices, show_verdict
from loraover.adapters.uniform.certificate import module_facts
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_export.formats.vllm.preflight import Preflight
from loraover_export.formats.vllm.report import VllmReport
from loraover_export.requests import VllmRequest


def show_report(report: VllmReport, request: VllmRequest, console: Console) -> None:
    """Print the pre-flight, the certificate, and how to serve the adapter if it was written."""
    if report.conversion is not None:
        facts = in_one_line(module_facts(report.conversion.modules))
        print_line(console, f"converted into a plain LoRA of rank {report.conversion.rank}: {facts}", "green")
    _show_preflight(report.preflight, console)
    if report.certificate is not None:
        show_matrices(report.certificate, console)
    if not report.passed:
        console.print("nothing was written")
        return
    print_line(console, f"wrote {request.output}")
    print_line(console, f"\nserve it:\n{report.serve}")
    print_line(console, "\nor load it into a running server, started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1:")
    print_line(console, str(report.load))


def _show_preflight(report: Preflight, console: Console) -> None:
    counts = [sum(f.level == level for f in report.findings) for level in ("error", "warning")]
    print_line(
        console, f"pre-flight: {report.modules} modules of {report.architecture}, rules of vLLM {report.vllm_version}"
    )
    for finding in report.findings:
        print_line(console, f"{finding.level}: {finding.rule}: {finding.found}", terminal_color(finding.level))
        print_line(console, f"  remedy: {finding.remedy}")
    summary = f"pre-flight {report.verdict}: {counts[0]} errors, {counts[1]} warnings, {len(report.rules)} rules"
    show_verdict(report, summary, console)
