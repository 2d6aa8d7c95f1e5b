"""The commands of many adapters: `loraover check` and `loraover export prepare`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pkgutil import resolve_name as imported
from typing import TYPE_CHECKING

from loraover.common.command_line import quiet_libraries
from loraover.reporting.request_command import Reporting, request_command
from loraover.sources.verb import perform
from loraover_export.check.request import CheckRequest, FleetCheckRequest, FleetRequest, PrepareRequest

if TYPE_CHECKING:
    from loraover_export.prepare.report import FleetReport, FleetRow

ONE = Reporting(
    "loraover_export.check.request:CheckRequest",
    "loraover_export.check.run:check_adapter",
    "loraover_export.check.report:show_report",
)


def _check(request: FleetCheckRequest, as_json: bool) -> int:
    """Show one adapter in full, and several as a table."""
    if len(request.sources) > 1 or request.html is not None:
        return _fleet("check_fleet", request, as_json)
    return ONE.run(CheckRequest(request.sources[0], engines=request.engines, model=request.model), as_json)


def _fleet(function: str, request: FleetRequest, as_json: bool) -> int:
    """Run a verb on many adapters, show each result when it is ready and then all, and return the exit code."""
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.prepare.report import show_report, show_row

    quiet_libraries()
    console = Console(stderr=as_json)

    def receive(row: FleetRow, progress: str) -> None:
        show_row(row, progress, console)
        if as_json:
            print(row.model_dump_json(), flush=True)

    report: FleetReport = perform(
        imported(f"loraover_export.prepare.fleet:{function}"),
        replace(request, report=ConsoleReporter(console), receive=receive),
    )
    show_report(report, console)
    return int(report.exit_code)


check = request_command(FleetCheckRequest, _check)
prepare = request_command(PrepareRequest, partial(_fleet, "prepare_fleet"))
