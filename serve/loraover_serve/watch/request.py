"""The arguments of a watch, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyPath, Request, argument, option


@dataclass(frozen=True)
class WatchRequest(Request):
    """Check the adapters of CONFIG on their servers again and again, and show which verdict changed.

    CONFIG is a YAML file with servers, and on each of them adapters with the references that `loraover record`
    wrote. The history is kept in SQLite. A page has a row for each adapter, and /metrics has the figures for
    Prometheus. The file is read again when it changes, and on SIGHUP. SIGTERM and Ctrl-C end the watch.

    Exit code with --once: that of `loraover verify` for the worst verdict.
    """

    verb = "loraover serve watch"
    examples = ("loraover serve watch watch.yaml", "loraover serve watch watch.yaml --once")
    json_help = None

    config: AnyPath = argument("YAML file with servers and adapters.")
    once: bool = option("Check every adapter once, without a page, and end.", default=False)

    @property
    def loads_models(self) -> bool:
        return False
