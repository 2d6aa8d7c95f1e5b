"""Judged rollouts for people, on a terminal and as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import pairwise

from rich.console import Console

from loraover.reporting.figures import Band, Curve, Key, curves_figure
from loraover.reporting.html_page import Origin, Page, Verdict, in_sentences, make_page
from loraover.reporting.palette import terminal_color, tone_of
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import Axis, Figure, short
from loraover.reporting.table import Column, Table
from loraover_serve.judge.results import Suspect, listed
from loraover_serve.rollouts.report import JudgedStep, RolloutReport, Span
from loraover_serve.rollouts.request import RolloutFileRequest
from loraover_serve.rollouts.verdict import NOT_EXCLUDED

TEMPLATE = "rollouts.html.j2"
SHOWN = 20
"""Rows of the table on a terminal; the page has all."""
DRAWN = 400
"""Largest number of steps in a figure; some steps of a longer run are left out."""
STRENGTHS = (-0.5, 2.0)
"""Widest range of the axis of strengths; values beyond it are cut off."""
LOWEST = 1e-6
"""Smallest value in nats that is drawn; smaller values are drawn there."""
BANDS: Sequence[Key] = [("as trained", "good", None), ("differs", "bad", None), ("not decided", "open", None)]


def show_report(report: RolloutReport, request: RolloutFileRequest, console: Console) -> None:
    """Print a row for each span of steps with one verdict, the verdict with its reason, and the output."""
    spans = report.spans
    if len(spans) > SHOWN:
        print_line(console, f"the last {SHOWN} of {len(spans)} changes of the verdict")
    console.print(spans_table(spans[-SHOWN:]))
    print_line(console, f"{report.word}: {sentence_of(report)}", terminal_color(report.word))
    print_line(console, f"  {report.decisive.reason}")
    for line in listed(report.decisive.not_excluded, NOT_EXCLUDED):
        print_line(console, f"  {line}")
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def sentence_of(report: RolloutReport) -> str:
    """The verdict on a run in one sentence."""
    decisive, last = report.decisive, report.steps[-1]
    if report.verdict == "differs":
        named = "no known fault explains it" if report.fault is None else report.fault
        over = "" if last.verdict == "differs" else f", and the last step is {last.word}"
        return f"from step {decisive.step}, {named}{over}"
    if report.verdict == "as trained":
        return f"at step {last.step} the engine samples from the policy that is trained, and no step differs"
    if decisive is not last:
        return f"step {decisive.step} cannot be judged"
    return f"no step differs, and step {last.step} does not show that the adapter is applied as it was trained"


def spans_table(spans: Sequence[Span]) -> Table[Span]:
    """Return a table with a row for each span of steps with one verdict, and the figures of its last step."""

    def last(cell: Callable[[JudgedStep], str]) -> Callable[[Span], str]:
        return lambda span: cell(span.last)

    return Table(
        [
            Column(
                "verdict",
                last(lambda s: s.word),
                "verdict",
                brief=last(lambda s: s.word.partition(",")[0]),
                verdict=last(lambda s: s.word),
            ),
            Column("steps", lambda span: span.name, "word"),
            Column("fault", last(lambda s: s.fault or "-"), "name"),
            Column("strength", last(_strength_of)),
            Column("effect", last(lambda s: short(s.effect))),
            Column("noise", last(lambda s: short(s.noise)), is_wide=True),
            Column("mean of\n|e - a|", last(lambda s: short(s.mean_difference))),
            Column("KL", last(lambda s: short(s.kl)), is_wide=True),
            Column("tokens", last(lambda s: str(s.tokens)), is_wide=True),
        ],
        spans,
        "Spans of steps with one verdict; figures are those of a span's last step, in nats",
    )


def _strength_of(step: JudgedStep) -> str:
    found = step.strength
    return "-" if found is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def to_page(report: RolloutReport) -> Page:
    """Make the report's page."""
    steps = report.steps[:: math.ceil(len(report.steps) / DRAWN)]
    decisive = report.decisive
    drawn = [_strength(steps), _sizes(steps), _scalars(steps)]
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Rollouts: {report.word}",
        heading="Does the engine sample from the policy that is trained?",
        verdict=Verdict(tone_of(report.word), report.word, in_sentences(sentence_of(report))),
        facts={
            "file": report.file,
            "steps": f"{report.steps[0].step} to {report.steps[-1].step}",
            "judged together": f"{report.window} steps at most",
        },
        origin=Origin(report.command, report.date, report.hardware, report.versions),
        figures=drawn,
        drawn=drawn,
        left_out=len(report.steps) - len(steps),
        decisive=decisive,
        not_excluded=NOT_EXCLUDED,
        last=report.steps[-1],
        table=spans_table(report.spans),
        suspects=_suspects_table(decisive.suspects),
    )


def _suspects_table(suspects: Sequence[Suspect]) -> Table[Suspect]:
    return Table(
        [
            Column("explains", lambda s: "yes" if s.explains else "no", "word"),
            Column("fault", lambda s: s.fault, "name"),
            Column("model", lambda s: s.detail, "name"),
            Column("distance", lambda s: short(s.rms)),
        ],
        suspects,
    )


def _steps_axis(steps: Sequence[JudgedStep]) -> Axis:
    first, last = steps[0].step, steps[-1].step
    room = max(1, (last - first) // 50)
    axis = Axis("step", first - room / 2, last + room / 2)
    return Axis(axis.label, axis.low, axis.high, ticks=[each for each, _ in axis.marks() if each == int(each)])


def _bands(steps: Sequence[JudgedStep]) -> list[Band]:
    """Shade each step in the colour of its verdict, up to the middle between it and each neighbour."""
    numbers = [each.step for each in steps]
    middles = [(one + other) / 2 for one, other in pairwise(numbers)]
    ends = [numbers[0] - 0.5, *middles, numbers[-1] + 0.5]
    found: list[Band] = []
    for each, (low, high) in zip(steps, pairwise(ends), strict=True):
        color = tone_of(each.word)
        if found and found[-1].color == color:
            found[-1] = Band(found[-1].low, high, color)
        else:
            found.append(Band(low, high, color))
    return found


def _strength(steps: Sequence[JudgedStep]) -> Figure:
    known = [(each.step, each.strength) for each in steps if each.strength is not None]
    ends = [end for _, strength in known for end in (strength.low, strength.high)]
    low, high = (min(max(end, STRENGTHS[0]), STRENGTHS[1]) for end in (min(ends, default=0), max(ends, default=1)))
    axis = Axis.around("strength of the adapter in what the engine samples", [0.0, 1.0, low, high])
    curve = Curve(
        "strength, with its interval",
        "subject",
        [(step, strength.value) for step, strength in known],
        [(strength.low, strength.high) for _, strength in known],
    )
    right = Curve("as trained", "good", [(step.step, 1.0) for step in (steps[0], steps[-1])], has_marks=False)
    title = "Strength of the adapter by step"
    return curves_figure(
        "strength", title, [curve, right], _steps_axis(steps), axis, bands=_bands(steps), more_keys=BANDS
    )


def _sizes(steps: Sequence[JudgedStep]) -> Figure:
    shown = {"effect": "effect", "noise": "noise", "distance": "subject"}
    labels = {"effect": "effect of the adapter", "noise": "noise", "distance": "engine from trainer"}
    judged = [each for each in steps if each.tokens]
    curves = [
        Curve(
            labels[name], color, [(s.step, max(value, LOWEST)) for s in judged if (value := getattr(s, name))], form=i
        )
        for i, (name, color) in enumerate(shown.items())
    ]
    values = [value for curve in curves for _, value in curve.points]
    axis = Axis.around("RMS difference of logprobs, nats", values, is_log=True)
    return curves_figure("sizes", "Effect and noise by step", curves, _steps_axis(steps), axis)


def _scalars(steps: Sequence[JudgedStep]) -> Figure:
    curves = [
        Curve("mean of |e - a|", "baseline", [(each.step, each.mean_difference) for each in steps]),
        Curve("KL: mean of e - a", "other", [(each.step, each.kl) for each in steps], form=1),
    ]
    values = [value for curve in curves for _, value in curve.points]
    axis = Axis.around("nats", [0.0, *values])
    return curves_figure("scalars", "What trainers log, by step", curves, _steps_axis(steps), axis)
