"""The page of a watch: a row for each adapter, the worst first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files

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
"""Intervals after which a check is no evidence any more, such as where the budget of requests is too small."""
ORDER = tuple(EXIT_CODES)
"""Verdicts, the worst first."""


@dataclass(frozen=True)
class PageRow:
    """A row of the page.

    Args:
        target: The adapter.
        last: Its last check; None before the first.
        change: The last check whose verdict or fault was another one than before.
        plot: Distances over time.
        is_late: Whether the last check is older than `LATE` intervals, so that nobody knows what the server does now.
    """

    target: WatchTarget
    last: Check | None
    change: Check | None
    plot: Figure
    is_late: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Distance, the largest that is allowed, and times, as texts."""
        if self.last is None:
            return "-", "-", "-", "-"
        change = "-" if self.change is None else moment(self.change.at)
        return short(self.last.distance), short(self.last.allowed), moment(self.last.at), change

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
        canary: The canary.
        now: The time, in seconds since 1970.
        command: Command line of the watch.
        config_fault: Reason why the last reading of the configuration failed; None if it did not.
    """
    rows = sorted((_row(canary, target, now) for target in canary.targets()), key=_urgency)
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
        figures=[row.plot for row in rows],
        config_fault=config_fault,
    )


def moment(at: float) -> str:
    """A time in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _row(canary: Canary, target: WatchTarget, now: float) -> PageRow:
    history = canary.history
    plot = draw(target, history.since(target.key, now - SHOWN_S, SHOWN), now)
    last = history.last(target.key)
    is_late = last is not None and now - last.at > LATE * target.interval_s
    return PageRow(target, last, history.last_change(target.key), plot, is_late)


def _urgency(row: PageRow) -> tuple[int, str, str]:
    place = len(ORDER) if row.last is None else ORDER.index(row.last.verdict)
    return (place, *row.target.key)


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
    """Draw distances over the last day: what noise explains as a line, and each check as a point of its verdict.

    Args:
        target: The adapter.
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
