"""The description of a folder as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from loraover.common.provenance import today
from loraover.inspection.report import FolderReport
from loraover.inspection.show import folder_rows
from loraover.inspection.verdict import verdict_of
from loraover.reporting.html_page import Origin, Page, Table, make_page
from loraover.reporting.schedule_figures import MAP
from loraover.reporting.svg import Figure

TEMPLATE = "inspect.html.j2"


def to_page(report: FolderReport, figures: Sequence[Figure], command: str) -> Page:
    """Make the page of a folder; every text is escaped.

    Args:
        report: Description of the folder.
        figures: Figures of its schedule; empty without cores.
        command: Command line that makes the page.
    """
    trained_on = None if report.run is None or report.run.result is None else report.run.result.hardware
    adapter, cores = report.adapter, report.cores
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Folder: {report.kind}",
        heading="What is this folder?",
        verdict=verdict_of(report),
        facts={
            "folder": report.path,
            "base model": None if adapter is None else adapter.base_model,
        },
        origin=Origin(command, today(), trained_on or "", {} if cores is None else cores.versions),
        figures=figures,
        map=[figure for figure in figures if figure.name == MAP],
        scores=[figure for figure in figures if figure.name != MAP],
        table=Table(("what", "value"), list(folder_rows(report)), ("what", "value"), ("value",)),
        next_steps=report.next_steps,
    )
