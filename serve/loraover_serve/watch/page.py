"""The page of a watch, with a row for each adapter, the worst first; and the watch's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.palette import tone_of
from loraover.reporting.svg import Axis, Drawing, Figure, short
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.watch.canary import Canary
from loraover_serve.watch.config import WatchTarget
from loraover_serve.watch.history import DAY_S, Check

TEMPLATE = "watch.html.j2"
WIDTH, HEIGHT, PAD = 220.0, 44.0, 4.0
SHOWN_S, SHOWN = DAY_S, 300
"""Time and number of checks of a plot."""
LATE = 3
"""Number of intervals after which the last check no longer shows the present state of a server."""
ORDER = tuple(EXIT_CODES)
"""Verdicts, the worst first."""


@dataclass(frozen=True)
class PageRow:
    """A row of the page.

    Args:
        last: Its last check; None before the first.
        change: The last check whose verdict or fault differed from the one before.
        plot: Distances over time.
        is_late: Whether the last check is older than `LATE` intervals, so that the server's present state is not known.
        caches: The last check that asked the server's cache; None if none did.
    """

    target: WatchTarget
    last: Check | None
    change: Check | None
    plot: Figure
    is_late: bool
    caches: Check | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Distance, the largest that is allowed, and times, as texts."""
        if self.last is None:
            return "-", "-", "-", "-"
        change = "-" if self.change is None else moment(self.change.at)
        return short(self.last.distance), short(self.last.allowed), moment(self.last.at), change

    @property
    def cache(self) -> str:
        """The last finding on the server's cache, with its time."""
        return "-" if self.caches is None else f"{self.caches.caches}, {moment(self.caches.at)}"

    @property
    def text(self) -> str:
        """The verdict, and whether it is old."""
        return "not checked yet" if self.last is None else f"{self.last.verdict}{' (old)' if self.is_late else ''}"

    @property
    def color(self) -> str:
        """Colour of the verdict."""
        if self.last is None or (self.is_late and self.last.verdict == "as trained"):
            return "faint"
        return tone_of(self.last.verdict)


def to_page(canary: Canary, now: float, command: str, config_fault: str | None) -> Page:
    """Make the page.

    Args:
        now: The time, in seconds since 1970.
        command: Command line of the watch.
        config_fault: Reason why the last reading of the configuration failed; None if it did not.
    """

    def row_of(target: WatchTarget) -> PageRow:
        history = canary.history
        plot = draw(target, history.since(target.key, now - SHOWN_S, SHOWN), now)
        last = history.last(target.key)
        is_late = last is not None and now - last.at > LATE * target.interval_s
        return PageRow(
            target, last, history.last_change(target.key), plot, is_late, history.last_of_caches(target.key)[0]
        )

    def urgency(row: PageRow) -> tuple[int, str, str]:
        return (len(ORDER) if row.last is None else ORDER.index(row.last.verdict), *row.target.key)

    rows = sorted(map(row_of, canary.targets()), key=urgency)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Watch: adapters on servers",
        heading="Do the servers answer as the adapters were trained?",
        verdict=_verdict(rows),
        facts={
            "adapters": str(len(rows)),
            "requests left this hour": str(canary.left(now)),
            "now": moment(now),
        },
        origin=Origin(command, None, "", {}),
        rows=rows,
        asks_caches=any(row.target.caches_every for row in rows),
        figures=[row.plot for row in rows],
        config_fault=config_fault,
    )


def moment(at: float) -> str:
    """A time in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _verdict(rows: list[PageRow]) -> Verdict:
    found = [row.last for row in rows if row.last is not None]
    bad = [check for check in found if check.verdict in ("differs", "failed")]
    waiting = len(rows) - len(found)
    later = f" {waiting} {'is' if waiting == 1 else 'are'} not checked yet." if waiting else ""
    if bad:
        named = " ".join(f"Look at {check.adapter} on {check.server}." for check in bad[:3])
        more = f" And {len(bad) - 3} more." if len(bad) > 3 else ""
        return Verdict("bad", f"{len(bad)} of {len(rows)} not as trained", f"{named}{more}{later}")
    undecided = sum(check.verdict == "inconclusive" for check in found)
    late = sum(row.is_late for row in rows)
    if undecided or waiting or late:
        sentence = f"{undecided} cannot be judged.{later}" if undecided else later.strip()
        old = f"{late} {'was' if late == 1 else 'were'} last checked more than {LATE} intervals ago." if late else ""
        return Verdict("open", "not all are known", f"{sentence} {old}".strip())
    return Verdict("good", "as trained", f"All {len(rows)} adapters answer as they were trained.")


def draw(target: WatchTarget, checks: list[Check], now: float) -> Figure:
    """Draw distances over the last day: each check as a point by its verdict, and the largest allowed as a line.

    Args:
        checks: Its checks, the first one first.
        now: The time at the right end.
    """
    drawing = Drawing(WIDTH, HEIGHT)
    values = [value for check in checks for value in (check.distance, check.allowed) if value]
    axis = Axis.around("nats", values, is_log=True)

    def place(check: Check, value: float | None) -> tuple[float, float]:
        x = WIDTH - PAD - (now - check.at) / SHOWN_S * (WIDTH - 2 * PAD)
        return x, HEIGHT - PAD - (axis.share(value) if value else 0.0) * (HEIGHT - 2 * PAD)

    allowed = [place(check, check.allowed) for check in checks if check.allowed]
    if len(allowed) > 1:
        drawing.line(allowed, "noise", dash="3 3")
    for check in checks:
        drawing.mark(*place(check, check.distance), tone_of(check.verdict), "circle" if check.distance else "bar", 2)
    server, adapter = target.key
    return drawing.figure(f"{server}-{adapter}", f"Distance of {adapter} on {server} over a day, and what is allowed")


PREFIX = "loraover_watch"
OF_ADAPTER = ("server", "adapter")
GAUGES = {
    "last_check_timestamp_seconds": "End of the last check, in seconds since 1970",
    "last_change_timestamp_seconds": "Last check whose verdict or fault differed from the one before",
    "distance_nats": "RMS distance of the adapter's answers from PyTorch's",
    "allowed_nats": "Largest distance that noise explains",
    "strength": "Strength of the adapter: 1 as trained, 0 if it is not applied",
    "interval_seconds": "Time between two checks",
}


class Metrics:
    """The metrics of a canary, read when Prometheus asks; an adapter that is no longer watched has none.

    Args:
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
