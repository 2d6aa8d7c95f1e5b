"""The table of a fleet as one HTML page that needs no network, which sorts and filters."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from loraover.common.atomic_output import publish_file
from loraover.common.provenance import environment, today
from loraover.reporting.html_page import Origin, Page, Table, Verdict, make_page
from loraover_export.fleet.row import FleetReport, FleetRow

TEMPLATE, SCRIPT = "fleet.html.j2", "fleet.js"
WORDS = ("verdict", "adapter", "kind", "what was done, or why not")
PACKAGES = ("loraover", "torch", "transformers")


def write_page(report: FleetReport, path: Path, command: str) -> None:
    """Write the page, in place of an earlier one, with the folders that it lies in.

    Args:
        report: What became of the adapters.
        path: File of the page.
        command: Command line that makes it again.

    Raises:
        OutputError: The page cannot be written.
    """
    html = to_page(report, command).html
    publish_file(path, lambda draft: draft.write_text(html, encoding="utf-8"), parents=True)


def to_page(report: FleetReport, command: str) -> Page:
    """Make the page; every text is escaped."""
    room = files(__package__)
    number, versions = len(report.rows), environment()
    return make_page(
        room.joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Fleet of adapters",
        heading="Can these adapters be served?",
        verdict=Verdict(
            "good" if report.passed else "bad",
            "all of them" if report.passed else "not all of them",
            f"Of {number} adapter{'s' * (number != 1)}: {report.counts()}.",
        ),
        facts={"time": f"{report.seconds:.0f} s"},
        origin=Origin(command, today(), "", {name: versions[name] for name in PACKAGES if name in versions}),
        script=room.joinpath(SCRIPT).read_text(encoding="utf-8"),
        table=_table(report),
        verdicts=sorted({row.verdict for row in report.rows}),
    )


def _table(report: FleetReport) -> Table:
    engines = list(dict.fromkeys(engine for row in report.rows for engine in row.engines))
    columns = (*WORDS[:-1], "rank", "error", "seconds", *engines, WORDS[-1])
    rows = [_cells(row, engines) for row in report.rows]
    return Table(columns, rows, (*WORDS, *engines), (WORDS[1], WORDS[-1]))


def _cells(row: FleetRow, engines: list[str]) -> list[str]:
    numbers = ["" if row.rank is None else str(row.rank), "" if row.error is None else f"{row.error:.2g}"]
    verdicts = [row.engines.get(engine, "") for engine in engines]
    done = "; ".join(text for text in (row.done, row.reason, "from the cache" if row.cached else "") if text)
    return [row.verdict, row.address, row.kind or "", *numbers, f"{row.seconds:.2f}", *verdicts, done]
