"""An attestation as text for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_export.attest.request import AttestRequest
from loraover_export.attest.run import AttestReport


def show_report(report: AttestReport, request: AttestRequest, console: Console) -> None:
    """Print what was attested, or what is not as attested."""
    found = report.statement.predicate
    kinds = {"passed": found.passed_tests, "undecided": found.warned_tests, "failed": found.failed_tests}
    tests = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    print_line(console, f"{len(report.statement.subject)} files; {tests}", terminal_color(found.result.lower()))
    if not report.is_checked:
        print_line(console, f"wrote {report.path}{', and signed the folder' if report.is_signed else ''}")
        return
    for fault in report.faults:
        print_line(console, fault, "red")
    if not report.faults:
        signed = "; the signature holds" if report.is_signed else "; no key was given to verify a signature"
        print_line(console, f"all files are as {report.path} has them{signed}", "green")
