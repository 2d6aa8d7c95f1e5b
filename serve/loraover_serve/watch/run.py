"""A watch from the command line, until a signal ends it or every adapter was checked once."""

from __future__ import annotations

import time

from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.watch.ask import ask
from loraover_serve.watch.config import read_config
from loraover_serve.watch.request import WatchRequest
from loraover_serve.watch.service import Watch, serving, signals


def watch_adapters(request: WatchRequest) -> int:
    """Watch until a signal ends it, and return the exit code.

    Args:
        request: What the user asked for.

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
    finally:
        watch.close()
    request.report.line("ended; the history is whole")
    return 0


def check_once(request: WatchRequest) -> int:
    """Check every adapter once, without a history, and return the exit code of the worst verdict.

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
        found.append(check.verdict)
    return next(code for verdict, code in EXIT_CODES.items() if verdict in found)
