"""The command `loraover inspect`."""

from __future__ import annotations

from loraover.inspection.request import InspectRequest
from loraover.reporting.request_command import request_command


def _inspect(request: InspectRequest, as_json: bool) -> None:
    from rich.console import Console

    from loraover.common.atomic_output import publish_text
    from loraover.inspection.folder import inspect_folder, read_schedule
    from loraover.inspection.show import show_folder, show_next_steps, to_page
    from loraover.reporting.html_page import check_new
    from loraover.reporting.reporter import print_line
    from loraover.reporting.schedule import plot_schedule, schedule_figures, show_schedule

    path, plot, html = request.path, request.plot, request.html
    report = inspect_folder(path)
    if html is not None:
        check_new(html, ".html")  # before anything is written
    if plot is not None:
        plot_schedule(read_schedule(path), plot)
    if html is not None:
        figures = [] if report.cores is None else schedule_figures(read_schedule(path))
        publish_text(html, to_page(report, figures, request.command()).html)
    if as_json:
        print(report.model_dump_json(indent=1))
        return
    console = Console()
    show_folder(report, console)
    if report.cores is not None:
        show_schedule(read_schedule(path), console)
    show_next_steps(report, console)
    for file in filter(None, (plot, html)):
        print_line(console, f"wrote {file}")


inspect = request_command(InspectRequest, _inspect)
