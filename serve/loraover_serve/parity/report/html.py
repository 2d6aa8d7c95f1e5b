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
    """The report as an HTML page; every text is escaped.

    Args:
        report: the report.
    """
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    ratios = ratio_plot(report.results, report.margin) if report.results else ""
    arms = {sample.arm for run in report.runs for sample in run.samples}
    return render_page(template, report=report, arms=arms, ratios=ratios, curves=_curves(report))


def _curves(report: ParityReport) -> list[tuple[str, str]]:
    """Titles and plots: times of each run, and throughput of engines that ran at several concurrencies."""
    curves = [
        (f"{name.capitalize()}: {run.engine}, {_at_once(run.concurrency)}", ecdf_plot(run, name))
        for run in report.runs
        if run.samples
        for name in DESCRIBED
    ]
    for engine in dict.fromkeys(t.engine for t in report.throughputs):
        mine = [t for t in report.throughputs if t.engine == engine]
        if len({t.concurrency for t in mine}) > 1:
            curves.append((f"Throughput: {engine}", throughput_plot(mine)))
    return curves


def _at_once(concurrency: int) -> str:
    return "one request at a time" if concurrency == 1 else f"{concurrency} requests at once"
