"""A parity report as one HTML page that needs no network."""

from __future__ import annotations

from importlib.resources import files

from loraover.reporting.html_page import Origin, Page, make_page
from loraover_serve.parity.report import tables
from loraover_serve.parity.report.figures import change_figures, throughput_figures, time_figures
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.report.verdict import verdict_of

HTML_FILE = "parity.html"
TEMPLATE = "parity.html.j2"


def to_page(report: ParityReport) -> Page:
    """Make the report's page; every text is escaped.

    Args:
        report: The report.
    """
    changes = change_figures(report.results, report.margin)
    throughputs, times = throughput_figures(report.throughputs), time_figures(report.runs)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Parity: {report.verdict}",
        heading="Is the folded adapter as fast as a plain LoRA, and are its answers the same?",
        verdict=verdict_of(report),
        facts={"engine": _engines(report), "base model": report.base_model},
        origin=Origin(report.command, report.date, report.hardware, report.versions),
        figures=[*changes, *throughputs, *times],
        report=report,
        changes=changes,
        throughputs=throughputs,
        times=times,
        tables=tables,
    )


def _engines(report: ParityReport) -> str:
    """Names of the engines, with the versions of those that are packages of these names."""
    names = dict.fromkeys(run.engine for run in report.runs)
    packages = {name: {"onnx": "onnxruntime"}.get(name.split()[0], name.split()[0]) for name in names}
    return ", ".join(f"{name} {report.versions.get(package, '')}".strip() for name, package in packages.items())
