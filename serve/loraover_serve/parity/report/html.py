"""A parity report as one HTML page that needs no network."""

from __future__ import annotations

from importlib.resources import files

from loraover.reporting.html_page import render_page
from loraover_serve.parity.judge.analysis import DESCRIBED
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.report.plots import ecdf_plot, ratio_plot, throughput_plot

HTML_FILE = "parity.html"
TEMPLATE = "parity.html.j2"


def render(report: ParityReport) -> str:
    """The page; every text of the report is escaped."""
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    ratios = ratio_plot(report.results, report.margin) if report.results else ""
    return render_page(template, report=report, ratios=ratios, curves=_curves(report))


def _curves(report: ParityReport) -> list[tuple[str, str]]:
    """Titles and plots: distributions of each run, and throughput where an engine ran at several concurrencies."""
    curves = [
        (f"{name.capitalize()}: {run.engine}, {run.concurrency} at once", ecdf_plot(run, name))
        for run in report.runs
        if run.samples
        for name in DESCRIBED
    ]
    for engine in dict.fromkeys(t.engine for t in report.throughputs):
        mine = [t for t in report.throughputs if t.engine == engine]
        if len({t.concurrency for t in mine}) > 1:
            curves.append((f"Throughput: {engine}", throughput_plot(mine)))
    return curves
