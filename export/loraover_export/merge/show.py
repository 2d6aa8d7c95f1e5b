"""The report of a merge as a table for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.show import in_one_line, show_place, show_verdict
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table
from loraover_export.merge.report import MergedWeight, MergeReport
from loraover_export.requests import MergeRequest

WORST_SHOWN = 12


def show_merge(report: MergeReport, request: MergeRequest, console: Console) -> None:
    """Print the weights that lost most of their delta, the totals, the verdict, and where the model is."""
    console.print(_weights_table(report))
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


def _weights_table(report: MergeReport) -> Table[MergedWeight]:
    worst = sorted(report.weights, key=lambda weight: -weight.stored.error)[:WORST_SHOWN]
    return Table(
        [
            Column("weight", lambda w: w.matrix.name, "name"),
            Column("dtype", lambda w: w.dtype),
            Column("delta\n/ W", lambda w: f"{w.delta_to_weight:.1e}"),
            Column("erased", lambda w: f"{w.stored.erased:.2%}"),
            Column("error", lambda w: f"{w.stored.error:.1%}"),
            Column("4-bit\nerased", lambda w: f"{w.four_bit.erased:.2%}"),
            Column("4-bit\nerror", lambda w: f"{w.four_bit.error:.1%}"),
        ],
        worst,
        f"Largest losses of the adapter, {len(worst)} of {len(report.weights)} weights",
        caption="Erased: share of the delta's squared norm in elements that stay. Error: relative to the delta's norm.",
    )
