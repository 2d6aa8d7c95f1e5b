"""Figures of a study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from loraover.reporting.figures import SHAPES, Band, Curve, FigureRow, Key, Point, curves_figure, rows_figure
from loraover.reporting.svg import Axis, Figure, Shape
from loraover_lab.study.grid import is_plain
from loraover_lab.study.report import MethodResult, TaskResult, is_over
from loraover_lab.study.verdict import PercentChange

HIGHEST = 1.5  # times the lowest loss
WIDEST = 1.6  # times the median interval; wider ones leave the axis


def forest(changes: Sequence[PercentChange], tasks: Sequence[TaskResult]) -> list[Figure]:
    """Draw every method's difference on every task, in per cent of the baseline's loss; empty without differences."""
    if not changes:
        return []
    by_name = {task.task: task for task in tasks}
    ends = [max(map(abs, (*change.interval, change.seen))) for change in changes]
    reach = min(max(ends), WIDEST * median(ends))
    looks = _looks(tasks)
    rows = [_row(change, by_name[change.task], looks[change.method]) for change in changes]
    keys: list[Key] = [
        (look.name, look.color, look.shape)
        for method, look in looks.items()
        if any(change.method == method for change in changes)
    ]
    keys.append(("too small to be seen", "noise", None))
    axis = Axis("test loss beside tuned plain LoRA, % (left is better)", -1.06 * reach, 1.06 * reach)
    title = "Difference to tuned plain LoRA, with its 95 % interval"
    return [rows_figure("differences", title, rows, axis, keys=keys, reference=0)]


def _row(change: PercentChange, task: TaskResult, look: _Look) -> FigureRow:
    mean, low, high = change.texts
    return FigureRow(
        f"{change.task}, {task.named(change.method)}",
        f"{mean} % [{low}, {high}]",
        [Point(change.mean, look.color, look.shape)],
        change.interval,
        [Band(-change.seen, change.seen, "noise")],
    )


@dataclass(frozen=True)
class _Look:
    """How a method is drawn in every figure of a study.

    Args:
        name: Its name in legends.
        color: Its colour.
        form: Its place among the methods of that colour.
    """

    name: str
    color: str
    form: int

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
    looks = _looks(tasks)
    return [_rates(task, looks) for task in tasks if task.methods]


def _rates(task: TaskResult, looks: Mapping[str, _Look]) -> Figure:
    swept = sorted({float(rate) for result in task.methods for rate in result.sensitivity.losses})
    means = [loss for result in task.methods for loss in result.sensitivity.losses.values()]
    each = [loss for r in task.methods for losses in r.sensitivity.seed_losses.values() for loss in losses]
    within = [loss for loss in means + each if loss <= HIGHEST * min(means)]
    x = Axis.around("learning rate", swept, is_log=True)
    return curves_figure(
        f"rates-{task.task}",
        f"{task.task}: loss against learning rate",
        [_curve(result, task, looks[result.method]) for result in task.methods],
        Axis(x.label, x.low, x.high, is_log=True, ticks=swept),
        Axis.around("validation loss, nats per token", within),
    )


def _curve(result: MethodResult, task: TaskResult, look: _Look) -> Curve:
    found = result.sensitivity
    points = [(float(rate), loss) for rate, loss in found.losses.items()]
    dots = [(float(rate), loss) for rate, losses in found.seed_losses.items() for loss in losses]
    return Curve(task.named(result.method), look.color, points, dots=dots, form=look.form)
