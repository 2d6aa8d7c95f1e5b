"""A verification as one HTML page that needs no network."""

from __future__ import annotations

from importlib.resources import files

from loraover.reporting.html_page import render_page
from loraover_serve.verify.report import VerifyReport

HTML_FILE = "verify.html"
TEMPLATE = "verify.html.j2"


def render(report: VerifyReport) -> str:
    """The report as an HTML page; every text is escaped.

    Args:
        report: the report.
    """
    return render_page(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"), report=report)
