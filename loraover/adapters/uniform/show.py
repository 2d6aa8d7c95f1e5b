"""The certificate of a plain LoRA as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from loraover.adapters.logits.show import in_one_line, show_place, show_verdict
from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.uniform.certificate import LoraCertificate, ModuleCertificate
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table

WORST_SHOWN = 12


def show_lora(certificate: LoraCertificate, request: Any, console: Console) -> None:
    """Print the modules with the largest errors, the verdict, and where the adapter is."""
    _show_modules(certificate, console)
    for note in certificate.notes:
        print_line(console, note)
    cancelled = [module.module for module in certificate.modules if module.rank == 0]
    if cancelled:
        print_line(console, f"{len(cancelled)} modules have a delta of zero: {', '.join(cancelled[:3])}", "yellow")
    show_matrices(certificate, console)
    reason = "a matrix failed its check"
    if all(matrix.passed for matrix in certificate.matrices):
        reason = "the logits are further from the source's than rounding explains"
    show_place(certificate, request.output, console, reason=reason)


def show_matrices(certificate: Any, console: Console) -> None:
    """Print the verdict of a certificate that has a rank, a data type and matrices, and what sums up the matrices."""
    facts = in_one_line(matrix_facts(certificate.matrices))
    text = f"certificate {certificate.verdict}: rank {certificate.rank}, {certificate.dtype}, {facts}"
    show_verdict(certificate, text, console)


def _show_modules(certificate: LoraCertificate, console: Console) -> None:
    worst = sorted(certificate.modules, key=lambda module: -module.relative_error_bound)[:WORST_SHOWN]
    title = f"Largest errors, {len(worst)} of {len(certificate.modules)} modules"
    caption = "Shares of each delta's Frobenius norm. Left out: by a smaller rank. Stored: by rounding A and B."
    heads = ("module", "shape", "rank", "norm", "left out", "stored", "in all")
    console.print(terminal_table(heads, map(_cells, worst), names=heads[:1], title=title, caption=caption))


def _cells(module: ModuleCertificate) -> tuple[str, ...]:
    norm = module.norm or 1.0
    return (
        module.module,
        f"{module.shape[0]} x {module.shape[1]}",
        str(module.rank),
        f"{module.norm:.3g}",
        f"{module.truncation_error / norm:.2%}" if module.truncation_error else "0",
        f"{module.storage_error / norm:.1e}",
        f"{module.relative_error_bound:.1e}",
    )
