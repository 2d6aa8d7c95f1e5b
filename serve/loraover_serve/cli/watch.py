"""The command `loraover serve watch`."""

from __future__ import annotations

from loraover.reporting.request_command import request_command
from loraover_serve.watch.request import WatchRequest


def _watch(request: WatchRequest, as_json: bool) -> int:
    """Watch until a signal ends it."""
    from dataclasses import replace

    from loraover.common.command_line import end_at_once
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.sources.verb import perform
    from loraover_serve.watch.run import watch_adapters

    found = perform(watch_adapters, replace(request, report=ConsoleReporter()))
    if request.once:
        return found.exit_code
    end_at_once(0)  # a check that waits for a silent server would keep the interpreter from ending


watch = request_command(WatchRequest, _watch)
