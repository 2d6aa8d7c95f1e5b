"""Figures of a study's page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from loraover.reporting.figures import Band, Curve, FigureRow, Key, Point, curves_figure, rows_figure
from loraover.reporting.svg import Axis, Figure
from loraover.study.report import MethodResult, TaskResult, is_over
from loraover.study.show import method_text
from loraover.study.verdict import Change

HIGHEST = 1.5  # times the lowest loss
WIDEST = 1.6  # times the median interval; wider ones leave the axis


def forest(changes: Sequence[Change], tasks: Sequence[TaskResult]) -> list[Figure]:
    """Draw every method's difference on every task, in per cent of the baseline's loss; empty without differences.

    Args:
        changes: The differences.
        tasks: Results on each task.
    """
    if not changes:
        return []
    by_name = {task.task: task for task in tasks}
    rows = [_row(change, by_name[change.task]) for change in changes]
    ends = [max(map(abs, (*change.interval, change.seen))) for change in changes]
    reach = min(max(ends), WIDEST * median(ends))
    keys: list[Key] = [
        ("LoRA-Over", "subject", "circle"),
        ("too small to be seen", "noise", None),
    ]
    if any(_color(by_name[change.task], change.method) == "other" for change in changes):
        keys.append(("other methods", "other", "circle"))
    axis = Axis("test loss beside tuned plain LoRA, % (left is better)", -1.06 * reach, 1.06 * reach)
    title = "Difference to tuned plain LoRA, with its 95 % interval"
    return [rows_figure("differences", title, rows, axis, keys=keys, reference=0)]


def _row(change: Change, task: TaskResult) -> FigureRow:
    low, high = change.interval
    return FigureRow(
        f"{change.task}, {method_text(change.method, task)}",
        f"{change.mean:+.1f} % [{low:+.1f}, {high:+.1f}]",
        [Point(change.mean, _color(task, change.method))],
        change.interval,
        [Band(-change.seen, change.seen, "noise")],
    )


def _color(task: TaskResult, method: str) -> str:
    return "subject" if is_over(task, method) else "baseline" if method == task.baseline else "other"


def rate_figures(tasks: Sequence[TaskResult]) -> list[Figure]:
    """Draw validation loss against learning rate: the mean of each method, and the seeds as points.

    Losses above `HIGHEST` times the lowest are outside the plot, so that the lowest parts of the curves can be seen.

    Args:
        tasks: Results on each task; those on which every method failed are left out.
    """
    return [_rates(task) for task in tasks if task.methods]


def _rates(task: TaskResult) -> Figure:
    swept = sorted({float(rate) for result in task.methods for rate in result.sensitivity.losses})
    means = [loss for result in task.methods for loss in result.sensitivity.losses.values()]
    each = [loss for r in task.methods for losses in r.sensitivity.seed_losses.values() for loss in losses]
    within = [loss for loss in means + each if loss <= HIGHEST * min(means)]
    x = Axis.around("learning rate", swept, is_log=True)
    return curves_figure(
        f"rates-{task.task}",
        f"{task.task}: loss against learning rate",
        [_curve(result, task) for result in task.methods],
        Axis(x.label, x.low, x.high, is_log=True, ticks=swept),
        Axis.around("validation loss, nats per token", within),
    )


def _curve(result: MethodResult, task: TaskResult) -> Curve:
    found = result.sensitivity
    points = [(float(rate), loss) for rate, loss in found.losses.items()]
    dots = [(float(rate), loss) for rate, losses in found.seed_losses.items() for loss in losses]
    return Curve(method_text(result.method, task), _color(task, result.method), points, dots=dots)
