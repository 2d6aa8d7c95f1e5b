"""A watch, until a signal ends it or every adapter was checked once."""

from __future__ import annotations

import time

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover.sources.verb import verb
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.watch.ask import ask
from loraover_serve.watch.config import read_config
from loraover_serve.watch.history import Check
from loraover_serve.watch.request import WatchRequest
from loraover_serve.watch.service import Watch, serving, signals


class WatchReport(StrictModel):
    """Findings of a watch at its end."""

    checks: list[Check] = Field(description="Last check of each adapter on each server, in the order of the file")

    @property
    def exit_code(self) -> int:
        """Exit code of the worst verdict, that of `loraover verify`; 0 if there is none."""
        found = {check.verdict for check in self.checks}
        return next((code for verdict, code in EXIT_CODES.items() if verdict in found), 0)


@verb(WatchRequest)
def watch_adapters(request: WatchRequest) -> WatchReport:
    """Check adapters on their servers again and again, until SIGTERM or SIGINT, or each of them once.

    Without `once` it blocks, serves the page and /metrics meanwhile, and has to be called in the main thread, which
    receives signals.

    Returns:
        The last check of each adapter.

    Raises:
        ConfigError: A configuration that cannot be used.
        CheckpointError: A file that is no reference.
        ModuleNotFoundError: prometheus_client or PyYAML is not installed.
        OutputError: A history that cannot be written, or a port that is in use.
    """
    if request.once:
        return check_once(request)
    watch = Watch(request)
    try:
        with serving(watch, request.report), signals(watch):
            watch.run()
        last = [check for target in watch.canary.targets() if (check := watch.history.last(target.key)) is not None]
    finally:
        watch.close()
    request.report.line("ended; the history is complete")
    return WatchReport(checks=last)


def check_once(request: WatchRequest) -> WatchReport:
    """Check every adapter once, without a history.

    Args:
        request: What the user asked for.

    Raises:
        ConfigError: A configuration that cannot be used.
        CheckpointError: A file that is no reference.
    """
    found = []
    for target in read_config(request.config).targets:
        check = ask(target, time.time)
        request.report.line(f"{check.adapter} on {check.server}: {check.verdict} ({check.reason})")
        found.append(check)
    return WatchReport(checks=found)
