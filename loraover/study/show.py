"""A study's report for people: Markdown, and one HTML page with plots."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rich.console import Console

from loraover.reporting.html_page import COLORS, INK, render_page, svg_axes
from loraover.study.report import MethodResult, StudyReport, TaskResult

REPORT_FILE, TABLE_FILE, HTML_FILE = "study.json", "study.md", "study.html"
TEMPLATE = "study.html.j2"
COLUMNS = (
    *("method", "rate", "test loss (sd)", "difference [95 %], p", "trained", "s / step", "GiB", "step norm"),
    *("update norm", "fold error", "basin", "regret"),
)
HIGHEST = 1.5  # times the lowest loss
END_NOTE = " (end): the best rate is at an end of the sweep."


def show_study(report: StudyReport, folder: Path, console: Console) -> None:
    """Print what the figures say, and which files hold them."""
    for line in (*report.words, f"wrote {folder / HTML_FILE}, {TABLE_FILE} and {REPORT_FILE}"):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def to_markdown(report: StudyReport) -> str:
    """Markdown with the verdict in sentences, and a table for each task."""
    lines = [f"- {line}" for line in report.words]
    if not report.is_whole:
        lines.append(f"- {unfinished(report)}")
    for task in report.tasks:
        lines += ["", f"### {task.task}", "", f"{task.examples} test examples, {seeds_text(report)}.{END_NOTE}", ""]
        lines += [
            f"| {' | '.join(COLUMNS)} |",
            f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
        ]
        lines += [_row(result, task) for result in task.methods]
        lines += [f"- {line}" for line in task.failures]
    return "\n".join(lines) + "\n"


def _row(r: MethodResult, task: TaskResult) -> str:
    compared = "baseline" if r.method == task.baseline else "-"
    if r.difference is not None:
        low, high = r.difference.interval
        compared = f"{r.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}], {r.difference.p:.2g}"
    at_least = ">= " if r.sensitivity.is_basin_cut else ""
    cells = [
        method_text(r.method, task),
        f"{r.rate:g}{'' if r.sensitivity.is_bracketed else ' (end)'}",
        f"{r.test_loss:.4f} ({_figure(r.deviation, '.4f')})",
        compared,
        f"{r.trained_parameters:,}",
        _figure(r.step_seconds, ".2f"),
        _figure(gibibytes(r), ".2f"),
        _figure(r.step_norm, ".3g"),
        _figure(r.update_norm, ".3g"),
        _figure(r.fold_error, ".1e"),
        f"{at_least}{r.sensitivity.basin_decades:.2f}",
        regret_text(r),
    ]
    return f"| {' | '.join(cells)} |"


def seeds_text(report: StudyReport) -> str:
    """Number of seeds, and how many of them chose the rates."""
    seeds = f"{report.seeds} seed{'' if report.seeds == 1 else 's'}"
    return (
        seeds if report.tuning_seeds is None else f"{seeds}, the first {report.tuning_seeds} of which chose the rates"
    )


def method_text(method: str, task: TaskResult) -> str:
    """Name of a method; rulers are marked."""
    return f"{method} (ruler)" if method in task.rulers else method


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def gibibytes(r: MethodResult) -> float | None:
    """Peak memory in GiB; None: not measured."""
    return None if r.peak_bytes is None else r.peak_bytes / 2**30


def regret_text(r: MethodResult) -> str:
    """Regret in percent, or "infinite" where a rate diverged."""
    found = r.sensitivity
    if found.regret is not None:
        return f"{found.regret:.2%}"
    return f"infinite ({found.diverged} of {found.diverged + len(found.losses)} rates failed)"


def unfinished(report: StudyReport) -> str:
    """Sentence for a report of a study that is still running."""
    return f"The study is not finished: {report.runs} runs are done, and only the first {report.seeds} seeds count."


def to_html(report: StudyReport) -> str:
    """HTML page; every text of the report is escaped."""
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    tasks = [(task, difference_plot(task), rate_plot(task)) for task in report.tasks]
    shown = {
        "figure": _figure,
        "gibibytes": gibibytes,
        "regret": regret_text,
        "unfinished": unfinished,
        "seeds_text": seeds_text,
        "method_text": method_text,
        "end_note": END_NOTE,
    }
    return render_page(template, report=report, tasks=tasks, **shown)


def difference_plot(task: TaskResult) -> str:
    """Plot of each method's difference to the baseline with its interval; empty where nothing is compared."""
    compared = [(r.method, r.difference) for r in task.methods if r.difference is not None]
    if not compared:
        return ""
    with svg_axes(8, 1.0 + 0.36 * len(compared)) as (axes, drawn):
        axes.axvline(0, color=INK, lw=0.8)
        for y, (method, found) in enumerate(reversed(compared)):
            color = _color(task, method)
            axes.plot(found.interval, [y, y], color=color, lw=2.5, solid_capstyle="butt")
            axes.plot([found.mean], [y], "o", color=color, ms=7)
        axes.set_yticks(range(len(compared)), [method_text(method, task) for method, _ in reversed(compared)])
        axes.set_xlabel(f"test loss minus that of {task.baseline}, nats per token")
    return drawn[0]


def _color(task: TaskResult, method: str) -> str:
    return COLORS[[result.method for result in task.methods].index(method) % len(COLORS)]


def rate_plot(task: TaskResult) -> str:
    """Plot of validation loss against learning rate, one line for each method; empty where every method failed.

    Losses above `HIGHEST` times the lowest are outside the plot, so that the lowest parts of the curves can be seen.
    """
    if not task.methods:
        return ""
    swept = sorted({float(rate) for result in task.methods for rate in result.sensitivity.losses})
    lowest = min(loss for result in task.methods for loss in result.sensitivity.losses.values())
    with svg_axes(8, 3.8) as (axes, drawn):
        for result in task.methods:
            losses = result.sensitivity.losses
            axes.plot(
                [float(rate) for rate in losses],
                list(losses.values()),
                marker="o",
                color=_color(task, result.method),
                label=method_text(result.method, task),
            )
        axes.set_xscale("log")
        axes.set_xticks(swept, [f"{rate:g}" for rate in swept])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0.97 * lowest, min(axes.get_ylim()[1], HIGHEST * lowest))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss, nats per token")
        axes.legend(frameon=False, fontsize=9)
    return drawn[0]
