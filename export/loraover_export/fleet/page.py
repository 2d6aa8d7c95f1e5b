"""The table of a fleet as one HTML page that needs no network, which sorts and filters."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import get_args

from loraover.common.atomic_output import publish_file
from loraover.common.provenance import environment, today
from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.palette import tone_of
from loraover_export.fleet.row import FleetReport, FleetRow, Form

TEMPLATE, SCRIPT = "fleet.html.j2", "fleet.js"
WORDS = {"right as exported": "all of them, some only as exported", "right on some": "not on every engine"}
"""Heads of the page by the worst verdict, where every adapter can be served."""
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
    counts = [f"Of {number} adapter{'s' * (number != 1)}: {report.counts()}."]
    return make_page(
        room.joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Fleet of adapters",
        heading="Can these adapters be served?",
        verdict=Verdict(
            tone_of(report.verdict) if report.passed else "bad",
            WORDS.get(report.verdict, "all of them") if report.passed else "not all of them",
            "\n".join(counts + [_counted(report, engine) for engine in report.engines]),
        ),
        facts={"time": f"{report.seconds:.0f} s"},
        origin=Origin(command, today(), "", {name: versions[name] for name in PACKAGES if name in versions}),
        script=room.joinpath(SCRIPT).read_text(encoding="utf-8"),
        rows=[(row, [(engine, *_cell(row, engine)) for engine in report.engines]) for row in report.rows],
        engines=report.engines,
        verdicts=sorted({row.verdict for row in report.rows}),
    )


def _counted(report: FleetReport, engine: str) -> str:
    """Say on how many adapters an engine is right in which form."""
    forms = Counter(row.served(engine) for row in report.rows if engine in row.engines)
    found = ", ".join(f"{forms[form]} {form.replace('it is', 'they are')}" for form in get_args(Form) if forms[form])
    silent = sum(row.engines.get(engine) == "wrong silently" for row in report.rows)
    return f"{engine}: right on {found}.{f' {silent} would be silently wrong as they are.' if silent else ''}"


def _cell(row: FleetRow, engine: str) -> tuple[str, str]:
    """Return the verdicts on an adapter as it is and as exported, and the tone of the first."""
    found, exported = row.engines.get(engine, ""), row.exported.get(engine, "")
    tone = tone_of(found) if found else ""
    return f"{found} → {exported}" if exported not in ("", found) and found != "right" else found, tone
