"""What the export for vLLM prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from loraover.common.command_line import printable
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.vllm.certificate import VllmCertificate
from loraover_export.vllm.preflight import Preflight

STYLES = {"error": "red", "warning": "yellow", "passed": "green"}


def show_preflight(report: Preflight, console: Console) -> None:
    """The verdict, and each finding with its remedy."""
    counts = [sum(f.level == level for f in report.findings) for level in ("error", "warning")]
    _line(
        console, f"pre-flight: {report.modules} modules of {report.architecture}, rules of vLLM {report.vllm_version}"
    )
    for finding in report.findings:
        _line(console, f"{finding.level}: {finding.rule}: {finding.found}", STYLES[finding.level])
        _line(console, f"  remedy: {finding.remedy}")
    summary = f"pre-flight {report.verdict}: {counts[0]} errors, {counts[1]} warnings, {len(report.rules)} rules"
    _line(console, summary, STYLES["passed" if report.passed else "error"])


def show_certificate(certificate: VllmCertificate, console: Console) -> None:
    """The verdict on what was written, in one line."""
    facts = ", ".join(f"{name} {value}" for name, value in matrix_facts(certificate.matrices).items())
    _line(
        console,
        f"certificate {certificate.verdict}: rank {certificate.rank}, {certificate.dtype}, {facts}",
        STYLES["passed" if certificate.passed else "error"],
    )


def show_launch(output: Path, commands: Mapping[str, str], console: Console) -> None:
    """Where the adapter is, and the two ways to serve it."""
    _line(console, f"wrote {output}")
    _line(console, f"\nserve it:\n{commands['serve']}")
    _line(console, "\nor load it into a running server, started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1:")
    _line(console, commands["load"])


def _line(console: Console, text: str, style: str | None = None) -> None:
    for line in text.split("\n"):
        console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)
