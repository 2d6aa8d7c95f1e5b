"""A study's report on a terminal, in Markdown, and as one HTML page that needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from statistics import fmean, median

from rich.console import Console

from loraover.reporting.figures import SHAPES, Band, Curve, FigureRow, Key, Point, curves_figure, rows_figure
from loraover.reporting.html_page import Origin, Page, make_page
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import Axis, Figure, Shape
from loraover.reporting.table import Column, Table, facts_table
from loraover.training.plan import ASSUMPTION, size_text
from loraover_lab.study.forecast import ENOUGH_SEEDS, MethodPlan, PowerReport, StudyPlan, TaskPower
from loraover_lab.study.grid import is_plain
from loraover_lab.study.report import MethodResult, StudyReport, TaskResult, is_over, signed, standing
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.verdict import PercentChange, changes, verdict_of

REPORT_FILE, TABLE_FILE, HTML_FILE = "study.json", "study.md", "study.html"

TEMPLATE = "study.html.j2"

OTHER_SCORES = {"mtbench": "mean rating, 1 to 10", "cola": "Matthews correlation in %"}
"""Names of the scores of benchmarks that do not count right answers."""

END_NOTE = " (end): the best rate is at an end of the sweep."

HIGHEST = 1.5  # times the lowest loss

WIDEST = 1.6  # times the median interval; wider ones leave the axis


def show_study(report: StudyReport, request: StudyRequest, console: Console) -> None:
    """Print what the figures say, and which files hold them."""
    written = f"wrote {request.output / HTML_FILE}, {TABLE_FILE} and {REPORT_FILE}"
    if (scores := scores_table(report)).rows:
        console.print(scores)
    for line in (*_verdict(report), *report.words, written):
        print_line(console, line)


def to_markdown(report: StudyReport) -> str:
    """Markdown with the verdict in sentences, and the tables of each task."""
    lines = [f"- {line}" for line in (*_verdict(report), *report.words)]
    if not report.is_whole:
        lines.append(f"- {unfinished(report)}")
    if (scores := scores_table(report)).rows:
        lines += ["", "### Scores", "", f"{scores.title}.", "", scores.markdown()]
        lines += ["", "Our choices, where the paper's abstract is silent:", ""] if report.scores.choices else []
        lines += [f"- {choice}" for choice in report.scores.choices]
    for task in report.tasks:
        lines += ["", f"### {task.task}", "", f"{task.examples} test examples, {seeds_text(report)}.{END_NOTE}", ""]
        lines += [methods_table(task).markdown(), "", costs_table(task).markdown()]
        lines += ["", *(f"- {line}" for line in task.failures)] if task.failures else []
    if report.names:
        lines += ["", facts_table(list(report.names.items()), ("name", "method")).markdown()]
    return "\n".join(lines) + "\n"


def to_page(report: StudyReport) -> Page:
    """Make the page of a study; every text is escaped."""
    differences, rates = forest(changes(report), report.tasks), rate_figures(report.tasks)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Study",
        heading="Does over-parameterisation beat a tuned LoRA?",
        verdict=verdict_of(report),
        facts={
            "rule": str(report.rule),
            "tasks": ", ".join(task.task for task in report.tasks),
            "seeds and runs": f"{seeds_text(report)}; {report.runs} runs",
        },
        origin=Origin(report.command, report.date, report.hardware, report.versions),
        figures=[*differences, *rates],
        report=report,
        differences=differences,
        rates=rates,
        tasks=[(task, methods_table(task), costs_table(task)) for task in report.tasks],
        unfinished=None if report.is_whole else unfinished(report),
        end_note=END_NOTE,
        scores=scores_table(report),
    )


def _verdict(report: StudyReport) -> tuple[str, str]:
    found = verdict_of(report)
    return f"{report.rule} Verdict: {found.word}.", found.sentence


def scores_table(report: StudyReport) -> Table[str]:
    """Return the methods' scores, one column a task, as papers print them; without rows if there are none."""
    scores: dict[str, dict[str, str]] = {}
    means: dict[str, list[float]] = {}
    for task in report.tasks:
        if task.task in report.scores.untrained:
            scores.setdefault("untrained", {})[task.task] = f"{report.scores.untrained[task.task]:.2f}"
        for one in task.methods:
            if one.score is not None:
                deviation = "" if one.score_deviation is None else f" ({one.score_deviation:.2f})"
                scores.setdefault(task.named(one.method), {})[task.task] = f"{one.score:.2f}{deviation}"
                means.setdefault(task.named(one.method), []).append(one.score)
    tasks = [task.task for task in report.tasks]

    def score(task: str) -> Column[str]:
        return Column(task, lambda method: scores[method].get(task, "-"))

    def mean(method: str) -> str:
        found = means.get(method, [])
        return f"{fmean(found):.2f}" if len(found) == len(tasks) else "-"

    columns = [Column("method", lambda method: method, "name"), *map(score, tasks)]
    if len(tasks) > 1:
        columns.append(Column("mean", mean))
    asked = report.scores
    kind = OTHER_SCORES.get(asked.benchmark or "", "right answers in %")
    without = f"; answers without a rating, which do not count: {asked.unrated}" if asked.unrated else ""
    title = f"{asked.benchmark or 'Held-out rows'}: {kind}, mean (sd) of {seeds_text(report)}{without}"
    return Table(columns, list(scores) if means else [], title)


def methods_table(task: TaskResult) -> Table[MethodResult]:
    """Return the losses of a task's methods, and how they compare with the baseline's."""

    def verdict(r: MethodResult) -> str:
        if r.difference is None:
            return "baseline" if r.method == task.baseline else "-"
        return standing(task, r)[0]

    def compared(r: MethodResult) -> tuple[str, str]:
        if r.difference is None:
            return "-", "-"
        mean, low, high = signed((r.difference.mean, *r.difference.interval), 4)
        return mean, f"{low} to {high}"

    def regret(r: MethodResult) -> str:
        found = r.sensitivity
        if found.regret is not None:
            return f"{found.regret:.2%}"
        return f"infinite ({found.diverged} of {found.diverged + len(found.losses)} rates failed)"

    def basin(r: MethodResult) -> str:
        return f"{'at least ' if r.sensitivity.is_basin_cut else ''}{r.sensitivity.basin_decades:.2f}"

    return Table(
        [
            Column("verdict", verdict, "word"),
            Column("method", lambda r: task.named(r.method), "name"),
            Column("rate", lambda r: f"{r.rate:g}{'' if r.sensitivity.is_bracketed else ' (end)'}"),
            Column("test loss", lambda r: f"{r.test_loss:.4f}"),
            Column("sd", lambda r: figure_text(r.deviation, ".4f")),
            Column("difference", lambda r: compared(r)[0]),
            Column("95 % interval", lambda r: compared(r)[1]),
            Column("p", lambda r: "-" if r.difference is None else f"{r.difference.p:.2g}"),
            Column("basin, decades", basin),
            Column("mean regret", regret),
        ],
        task.methods,
    )


def costs_table(task: TaskResult) -> Table[MethodResult]:
    """Return what a task's methods cost in training and served."""

    def cost(head: str, value: Callable[[MethodResult], float | None], form: str) -> Column[MethodResult]:
        return Column(head, lambda r: figure_text(value(r), form))

    return Table(
        [
            Column("method", lambda r: task.named(r.method), "name"),
            cost("trained", lambda r: r.trained_parameters, ",d"),
            cost("served rank", lambda r: r.served_rank, "d"),
            cost("served bytes", lambda r: r.served_bytes, ",d"),
            cost("s / step", lambda r: r.step_seconds, ".2f"),
            cost("GiB", lambda r: None if r.peak_bytes is None else r.peak_bytes / 2**30, ".2f"),
            cost("step norm", lambda r: r.step_norm, ".3g"),
            cost("update norm", lambda r: r.update_norm, ".3g"),
            cost("fold error", lambda r: r.fold_error, ".1e"),
        ],
        task.methods,
    )


POWER_NOTE = (
    "Smallest difference: the true difference that four of five such studies would show, in % of the baseline's loss, "
    "for one task; the correction for five tasks makes it a fifth larger. The last three columns say what halves it: "
    "this number of test rows, this number of seeds, or both multiplied by this factor; none: no number does."
)


def show_power(report: PowerReport, request: StudyRequest, console: Console) -> None:
    """Print the smallest difference that each comparison of a study would see."""
    columns: list[Column[TaskPower]] = [
        Column("task", lambda one: one.task, "name"),
        Column("spread of", lambda one: f"{one.measured_on}, {one.measured_seeds} seeds", "name"),
        Column("rows", lambda one: f"{one.rows:,}"),
        Column("seeds", lambda one: str(one.seeds)),
        Column("smallest", lambda one: f"{one.smallest:.2g} %"),
        Column("half:\nrows", lambda one: "none" if one.rows_to_halve is None else f"{one.rows_to_halve:,}"),
        Column("half:\nseeds", lambda one: "none" if one.seeds_to_halve is None else f"{one.seeds_to_halve:,}"),
        Column("half:\nboth", lambda one: f"x {one.factor_to_halve:.1f}"),
    ]
    compared = {(one.method, one.baseline): f"{one.method} against {one.baseline}" for one in report.tasks}
    for pair, title in compared.items():
        print_line(console, title)
        rows = [one for one in report.tasks if (one.method, one.baseline) == pair]
        console.print(Table(columns, rows))
    print_line(console, POWER_NOTE)
    if (seeds := min(one.measured_seeds for one in report.tasks)) < ENOUGH_SEEDS:
        print_line(
            console,
            f"warning: a spread was measured with {seeds} seeds only, so the true smallest difference may be several "
            f"times larger; take {ENOUGH_SEEDS} seeds or more for a pilot.",
        )
    if report.unknown:
        print_line(
            console,
            f"warning: not compared, since the pilot lacks two seeds of them beside a plain LoRA: "
            f"{', '.join(report.unknown)}",
        )


def show_study_plan(plan: StudyPlan, request: StudyRequest, console: Console) -> None:
    """Print the runs of each method on each task with their needs, and the sum."""

    def memory(one: MethodPlan) -> str:
        return f"{'over ' * (one.activations is None)}{size_text(one.held_bytes + (one.activations or 0))}"

    columns: list[Column[MethodPlan]] = [
        Column("task", lambda one: one.task, "name"),
        Column("method", lambda one: one.method, "name"),
        Column("runs", lambda one: str(one.runs)),
        Column("steps", lambda one: f"{one.steps:,}"),
        Column("memory", memory),
        Column("s / step", lambda one: figure_text(one.step_seconds, ".2g")),
        Column("time", lambda one: "-" if one.hours is None else hours_text(one.hours)),
    ]
    console.print(Table(columns, plan.methods))
    time = "time is predicted only if this machine can run a trial."
    if plan.hours is not None:
        time = f"{hours_text(plan.hours)} of training, one run after another. Evaluation comes on top."
        time += " Where the data are on the hub, that is an upper bound: all examples at full length."
    print_line(console, f"{plan.runs} runs; {time} {ASSUMPTION}")


def hours_text(hours: float) -> str:
    """Return a duration in hours, or in minutes where it is less than one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{math.ceil(60 * hours)} min"


def seeds_text(report: StudyReport) -> str:
    """Number of seeds, and how many of them chose the rates."""
    seeds = f"{report.seeds} seed{'' if report.seeds == 1 else 's'}"
    if report.tuning_seeds is None:
        return seeds
    first = "" if report.tuning_seeds == 1 else f" {report.tuning_seeds}"
    return f"{seeds}, the first{first} of which chose the rates"


def figure_text(value: float | None, form: str) -> str:
    """Return a figure, or "-" for None."""
    return "-" if value is None else format(value, form)


def unfinished(report: StudyReport) -> str:
    """Sentence for a report of a study that is still running."""
    return f"The study is not finished: {report.runs} runs are done, and only the first {report.seeds} seeds count."


def forest(changes: Sequence[PercentChange], tasks: Sequence[TaskResult]) -> list[Figure]:
    """Draw every method's difference on every task, in per cent of the baseline's loss; empty without differences."""
    if not changes:
        return []
    by_name = {task.task: task for task in tasks}
    ends = [max(map(abs, (*change.interval, change.seen))) for change in changes]
    reach = min(max(ends), WIDEST * median(ends))
    looks = _looks(tasks)
    rows = []
    for change in changes:
        mean, low, high = change.texts
        label = f"{change.task}, {by_name[change.task].named(change.method)}"
        points = [Point(change.mean, looks[change.method].color, looks[change.method].shape)]
        unseen = Band(-change.seen, change.seen, "noise")
        rows.append(FigureRow(label, f"{mean} % [{low}, {high}]", points, change.interval, [unseen]))
    keys: list[Key] = [
        (look.name, look.color, look.shape)
        for method, look in looks.items()
        if any(change.method == method for change in changes)
    ]
    keys.append(("too small to be seen", "noise", None))
    axis = Axis("test loss beside tuned plain LoRA, % (left is better)", -1.06 * reach, 1.06 * reach)
    title = "Difference to tuned plain LoRA, with its 95 % interval"
    return [rows_figure("differences", title, rows, axis, keys=keys, reference=0)]


@dataclass(frozen=True)
class _Look:
    """How a method is drawn in every figure of a study."""

    name: str
    color: str
    form: int  # its place among the methods of that colour

    @property
    def shape(self) -> Shape:
        return SHAPES[self.form % len(SHAPES)]


def _looks(tasks: Sequence[TaskResult]) -> dict[str, _Look]:
    """Look of every method, in the order of the study: LoRA-Over, plain LoRA and others differ in colour."""
    looks: dict[str, _Look] = {}
    for task in tasks:
        for method in (*(result.method for result in task.methods), *task.failed):
            if method not in looks:
                color = "subject" if is_over(task, method) else "baseline" if is_plain(method) else "other"
                form = sum(look.color == color for look in looks.values())
                looks[method] = _Look(task.shown(method), color, form)
    return looks


def rate_figures(tasks: Sequence[TaskResult]) -> list[Figure]:
    """Draw validation loss against learning rate: the mean of each method, and the seeds as points.

    Losses above `HIGHEST` times the lowest are outside the plot, so that the lowest parts of the curves can be seen.
    """
    looks, figures = _looks(tasks), []
    for task in (task for task in tasks if task.methods):
        curves = []
        for result in task.methods:
            look, found = looks[result.method], result.sensitivity
            points = [(float(rate), loss) for rate, loss in found.losses.items()]
            dots = [(float(rate), loss) for rate, losses in found.seed_losses.items() for loss in losses]
            curves.append(Curve(task.named(result.method), look.color, points, dots=dots, form=look.form))
        swept = sorted({rate for curve in curves for rate, _ in curve.points})
        lowest = min(loss for curve in curves for _, loss in curve.points)
        losses = [loss for curve in curves for _, loss in (*curve.points, *curve.dots) if loss <= HIGHEST * lowest]
        title = f"{task.task}: loss against learning rate"
        x = replace(Axis.around("learning rate", swept, is_log=True), ticks=swept)
        y = Axis.around("validation loss, nats per token", losses)
        figures.append(curves_figure(f"rates-{task.task}", title, curves, x, y))
    return figures
