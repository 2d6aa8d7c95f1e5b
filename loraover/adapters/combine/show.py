"""The comparison of two adapters as tables for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.combine.diff_report import DiffReport, LogitDiff
from loraover.adapters.combine.requests import DiffRequest
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table

SHOWN = 12


def show_diff(report: DiffReport, request: DiffRequest, console: Console) -> None:
    """Print the modules that differ most, the totals, and the logits if they were compared."""
    _show_modules(report, console)
    if report.other_tensors:
        print_line(
            console, f"{len(report.other_tensors)} other parameters differ: {', '.join(report.other_tensors[:3])}"
        )
    if report.logits is not None:
        _show_logits(report.logits, console)
    print_line(
        console,
        f"norms of the adapters {report.norms[0]:.4g} and {report.norms[1]:.4g}, norm of their difference "
        f"{report.difference:.4g}: {report.relative_difference:.2%} of the larger",
    )


def _show_modules(report: DiffReport, console: Console) -> None:
    shown = sorted(report.modules, key=lambda module: -module.relative_difference)[:SHOWN]
    rows = (
        (
            module.module,
            f"{module.ranks[0]}, {module.ranks[1]}",
            f"{module.norms[0]:.3g}",
            f"{module.norms[1]:.3g}",
            f"{module.relative_difference:.1%}",
            _ends(module.column_angles),
            _ends(module.row_angles),
        )
        for module in shown
    )
    heads = ("module", "ranks", "norm 1", "norm 2", "diff.", "column\nangles", "row\nangles")
    title = f"Largest differences, {len(shown)} of {len(report.modules)} modules"
    caption = "Difference: of the larger norm. Angles: smallest and largest principal angle, in degrees."
    console.print(terminal_table(heads, rows, names=heads[:1], title=title, caption=caption))


def _ends(angles: list[float]) -> str:
    return f"{angles[0]:.1f}, {angles[-1]:.1f}" if angles else "-"


def _show_logits(logits: LogitDiff, console: Console) -> None:
    effects = zip(("first to base", "second to base"), logits.effects, strict=True)
    rows = [
        (label, f"{d.max_logit:.2e}", f"{d.mean_logit:.2e}", f"{d.max_kl:.2e}", f"{d.top1_agreement:.2%}")
        for label, d in (("first to second", logits.difference), *effects)
    ]
    heads = ("", "max logit", "mean logit", "max KL", "top-1 agreement")
    title = f"Logits on {logits.prompt_source}, {logits.tokens} tokens"
    console.print(terminal_table(heads, rows, words=heads[:1], title=title))
