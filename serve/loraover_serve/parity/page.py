"""A parity report as one HTML page that needs no network, with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from loraover.reporting.figures import Band, Curve, FigureRow, Key, Point, curves_figure, rows_figure
from loraover.reporting.html_page import Origin, Page, make_page
from loraover.reporting.svg import Axis, Figure
from loraover_serve.judge.limits import BASE
from loraover_serve.parity import tables
from loraover_serve.parity.report import (
    PER,
    UNBOUNDED,
    ParityReport,
    at_once,
    end_text,
    percent_text,
    verdict_of,
)
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement
from loraover_serve.parity.statistics import DESCRIBED, Result, Throughput
from loraover_serve.parity.tables import deciding_first

HTML_FILE = "parity.html"
TEMPLATE = "parity.html.j2"
COLORS = {FOLDED: "subject", VANILLA: "baseline", CONTROL: "noise", BASE: "base"}
"""Colours of the arms; further arms are "other"."""
POINTS = 50  # points of a curve, one for every second per cent of the answers
SHOWN_SHARE = 0.99  # the slowest answers of an arm would stretch the axis


def to_page(report: ParityReport) -> Page:
    """Make the report's page; every text is escaped."""
    names = dict.fromkeys(run.engine for run in report.runs)  # with versions of those that are packages of these names
    packages = {name: {"onnx": "onnxruntime"}.get(name.split()[0], name.split()[0]) for name in names}
    engines = [f"{name} {report.versions.get(package, '')}".strip() for name, package in packages.items()]
    changes = change_figures(report.results, report.margin)
    throughputs, times = throughput_figures(report.throughputs), time_figures(report.runs)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Parity: {report.verdict}",
        heading="Is the folded adapter as fast as a plain LoRA, and are its answers the same?",
        verdict=verdict_of(report),
        facts={"engine": ", ".join(engines), "base model": report.base_model},
        origin=Origin(report.command, report.date, report.hardware, report.versions),
        figures=[*changes, *throughputs, *times],
        report=report,
        changes=changes,
        throughputs=throughputs,
        times=times,
        tables=tables,
    )


class _Place(NamedTuple):
    """Where an arm was measured."""

    engine: str
    concurrency: int

    @property
    def title(self) -> str:
        return f"{self.engine}, {at_once(self.concurrency)}"

    @property
    def file(self) -> str:
        return f"{self.engine.replace(' ', '-')}-{self.concurrency}"


def change_figures(results: Sequence[Result], margin: float) -> list[Figure]:
    """Draw by how much slower each arm is than plain LoRA, one figure for each engine and concurrency, on one axis.

    The folded arm comes first and then the control, since the verdict depends on these. The base model is so much
    faster that it would stretch the axis; the caption has it.

    Args:
        results: The ratios.
        margin: Largest difference of times that still counts as equal (0.05 is 5 %).
    """
    compared = [result for result in results if result.arm != BASE]
    deciding = [r for r in compared if r.arm in (FOLDED, CONTROL)]
    band = Band(100 * (1 / (1 + margin) - 1), 100 * margin)
    ends = [_percent(end) for r in deciding for end in r.interval if end < UNBOUNDED]
    axis = Axis.around("slower than plain LoRA, %", [1.2 * band.low, 1.2 * band.high, *ends])
    keys: list[Key] = [(f"within {100 * margin:g} %", "good", None)]
    figures = []
    for place in dict.fromkeys(_Place(r.engine, r.concurrency) for r in compared):
        rows = []
        for r in deciding_first(_at(compared, place)):
            low, high = map(_percent, r.interval)
            note = f"{percent_text(r.ratio)} % [{', '.join(map(percent_text, r.interval))}]"
            point = Point(_percent(r.ratio), _color(r.arm))
            rows.append(FigureRow(f"{r.arm}, {PER[r.measure]}", note, [point], (low, high)))
        figure = rows_figure(f"speed-{place.file}", place.title, rows, axis, keys=keys, band=band, reference=0)
        figures.append(replace(figure, caption=_base_text(_at(results, place))))
    return figures


def _base_text(results: Sequence[Result]) -> str:
    found = [
        f"{r.ratio:.2f} [{', '.join(end_text(end, 2) for end in r.interval)}] {PER[r.measure]}"
        for r in results
        if r.arm == BASE
    ]
    return f"Not drawn: the base model. It takes plain LoRA's time x {', x '.join(found)}." if found else ""


def _at(results: Sequence[Result], place: _Place) -> list[Result]:
    return [r for r in results if (r.engine, r.concurrency) == place]


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _color(arm: str) -> str:
    return COLORS.get(arm, "other")


def time_figures(runs: Sequence[Measurement]) -> list[Figure]:
    """Draw each arm's cumulative distribution of every time, without the base model's."""
    figures, shares = [], np.linspace(0, 1, POINTS + 1)
    for run, name in ((run, name) for run in runs if run.samples for name in DESCRIBED):
        found = {s.arm for s in run.samples if s.arm != BASE}
        arms = sorted(found, key=lambda arm: (list(COLORS).index(arm) if arm in COLORS else len(COLORS), arm))
        curves = []
        for arm in reversed(arms):  # the folded arm is drawn last, above the others
            values = [1000 * v for s in run.samples if s.arm == arm for v in DESCRIBED[name](s)]
            places = np.quantile(values, shares, method="inverted_cdf") if values else np.zeros(0)
            points = [(float(x), 100 * float(share)) for x, share in zip(places, shares, strict=False)]
            curves.append(Curve(arm, _color(arm), points, has_marks=False))
        shown = [x for curve in curves for x, share in curve.points if share <= 100 * SHOWN_SHARE]
        place = _Place(run.engine, run.concurrency)
        figures.append(
            curves_figure(
                f"{name.replace(' ', '-')}-{place.file}",
                f"{name.capitalize()}: {place.title}",
                curves,
                Axis.around("milliseconds", shown, pad=0.02),
                Axis("share of answers, %", 0, 100, ticks=(0, 25, 50, 75, 100)),
                height=150,
            )
        )
    return figures


def throughput_figures(throughputs: Sequence[Throughput]) -> list[Figure]:
    """Draw tokens per second against concurrency, for engines that were measured at several."""
    figures = []
    for engine in dict.fromkeys(t.engine for t in throughputs):
        mine = sorted((t for t in throughputs if t.engine == engine), key=lambda t: t.concurrency)
        levels = sorted({t.concurrency for t in mine})
        if len(levels) < 2:
            continue
        arms = sorted({t.arm for t in mine}, key=lambda arm: (arm == FOLDED, arm))
        curves = []
        for arm in arms:
            measured = [t for t in mine if t.arm == arm]
            points = [(float(t.concurrency), t.tokens_per_second) for t in measured]
            curves.append(Curve(arm, _color(arm), points, [t.interval for t in measured]))
        highest = max(t.interval[1] for t in mine)
        x = Axis.around("requests at once", levels)
        figures.append(
            curves_figure(
                f"throughput-{engine.replace(' ', '-')}",
                f"Throughput: {engine}",
                curves,
                Axis(x.label, x.low, x.high, ticks=levels),
                Axis("tokens per second", 0, 1.05 * highest),
                height=150,
            )
        )
    return figures
