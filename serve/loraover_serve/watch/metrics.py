"""Figures for Prometheus, in the text format of prometheus_client (extra `watch`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.watch.canary import Canary

PREFIX = "loraover_watch"
OF_ADAPTER = ("server", "adapter")
GAUGES = {
    "last_check_timestamp_seconds": "End of the last check, in seconds since 1970",
    "last_change_timestamp_seconds": "Last check whose verdict or fault was another one than before",
    "distance_nats": "RMS distance of the adapter's answers from PyTorch's",
    "allowed_nats": "Largest distance that noise explains",
    "strength": "Strength of the adapter: 1 as trained, 0 if it is not applied",
    "interval_seconds": "Time between two checks",
}


class Metrics:
    """The figures of a canary, read when Prometheus asks: an adapter that is no longer watched has none.

    Args:
        canary: The canary.
        clock: Clock in seconds since 1970.
    """

    def __init__(self, canary: Canary, clock: Any) -> None:
        from prometheus_client import CollectorRegistry

        self._canary, self._clock = canary, clock
        self.is_config_read = True
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The figures as Prometheus reads them."""
        from prometheus_client import generate_latest

        content: bytes = generate_latest(self._registry)
        return content

    def collect(self) -> Iterator[Any]:
        """Yield all figures."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, help_: str, labels: tuple[str, ...] = ()) -> Any:
            return GaugeMetricFamily(f"{PREFIX}_{name}", help_, labels=labels)

        verdicts = gauge("verdict", "1 for the verdict of the last check, 0 for the others", (*OF_ADAPTER, "verdict"))
        found = {name: gauge(name, help_, OF_ADAPTER) for name, help_ in GAUGES.items()}
        for target in self._canary.targets():
            found["interval_seconds"].add_metric(target.key, target.interval_s)
            last, change = self._canary.history.last(target.key), self._canary.history.last_change(target.key)
            if last is None:
                continue
            for verdict in EXIT_CODES:
                verdicts.add_metric((*target.key, verdict), float(verdict == last.verdict))
            values = {
                "last_check_timestamp_seconds": last.at,
                "last_change_timestamp_seconds": None if change is None else change.at,
                "distance_nats": last.distance,
                "allowed_nats": last.allowed,
                "strength": last.strength,
            }
            for name, value in values.items():
                if value is not None:
                    found[name].add_metric(target.key, value)
        yield verdicts
        yield from found.values()
        checks = CounterMetricFamily(f"{PREFIX}_checks", "Number of checks", labels=(*OF_ADAPTER, "verdict"))
        for key, count in sorted(self._canary.checks.items()):
            checks.add_metric(key, count)
        requests = CounterMetricFamily(f"{PREFIX}_requests", "Number of requests that checks sent", labels=("server",))
        for server, count in sorted(self._canary.requests.items()):
            requests.add_metric((server,), count)
        deferred = CounterMetricFamily(f"{PREFIX}_deferred", "Number of checks that waited for the budget")
        deferred.add_metric((), self._canary.deferred)
        left = gauge("budget_left_requests", "Requests that the budget of this hour has left")
        left.add_metric((), self._canary.left(self._clock()))
        read = gauge("config_read", "1; 0 if the configuration could not be read again and the earlier one is used")
        read.add_metric((), float(self.is_config_read))
        yield from (checks, requests, deferred, left, read)
