"""A conversion as text for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover.common.command_line import printable
from loraover_export.convert.report import ConvertReport, OutputsOfConversion
from loraover_export.numerics.matrix_certificate import matrix_facts

WORST_SHOWN = 8


def show_report(report: ConvertReport, output: Path, console: Console) -> None:
    """Print the ranks, the modules with the largest errors, the effect on logits, and where the adapter is."""
    certificate = report.certificate
    done = "the best approximation of rank" if report.truncated else "exact, of rank"
    _line(console, f"{report.method}: exact rank {report.exact_rank}; written: {done} {certificate.rank}")
    _line(console, f"exact rank {report.exact_rank}: {report.engines}")
    console.print(_modules(report))
    facts = ", ".join(f"{name} {value}" for name, value in matrix_facts(certificate.matrices).items())
    _line(console, f"certificate {certificate.verdict}: {certificate.dtype}, {facts}")
    for note in certificate.notes:
        _line(console, f"note: {note}")
    if report.outputs is not None:
        _show_outputs(report.outputs, console)
    _line(console, f"wrote {output}" if report.passed else "nothing was written")


def _modules(report: ConvertReport) -> Table:
    modules = sorted(report.certificate.modules, key=lambda module: -module.relative_error_bound)[:WORST_SHOWN]
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Worst {len(modules)} of {len(report.certificate.modules)} modules, relative to the norm of delta_W",
    )
    table.add_column("module", no_wrap=True, overflow="ellipsis")
    for column in ("rank", "left out", "storage", "arithmetic"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for module in modules:
        errors = (module.truncation_error, module.storage_error, module.arithmetic_bound)
        table.add_row(
            escape(module.module), str(module.rank), *(f"{error / (module.norm or 1.0):.2e}" for error in errors)
        )
    return table


def _show_outputs(outputs: OutputsOfConversion, console: Console) -> None:
    error = outputs.error
    _line(
        console,
        f"logits on {outputs.prompt_source}, {outputs.tokens} tokens, {outputs.compute_dtype} on {outputs.device}: "
        f"largest difference from the source {error.max_logit:.2e}, largest KL {error.max_kl:.2e} nats, the same most "
        f"likely token at {error.top1_agreement:.2%}; the source moves logits by up to {outputs.adapter_effect:.3g}",
    )


def _line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
