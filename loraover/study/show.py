"""A study's report for people, in Markdown."""

from __future__ import annotations

from rich.console import Console

from loraover.reporting.terminal_table import terminal_table
from loraover.study.power import PowerReport, TaskPower
from loraover.study.report import MethodResult, StudyReport, TaskResult
from loraover.study.request import StudyRequest
from loraover.study.verdict import verdict_of

REPORT_FILE, TABLE_FILE, HTML_FILE = "study.json", "study.md", "study.html"
COLUMNS = (
    *("method", "rate", "test loss (sd)", "difference [95 %], p", "trained", "served rank", "served bytes"),
    *("s / step", "GiB", "step norm", "update norm", "fold error", "basin", "regret"),
)
END_NOTE = " (end): the best rate is at an end of the sweep."


def show_study(report: StudyReport, request: StudyRequest, console: Console) -> None:
    """Print what the figures say, and which files hold them."""
    written = f"wrote {request.output / HTML_FILE}, {TABLE_FILE} and {REPORT_FILE}"
    for line in (*_verdict(report), *report.words, written):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _verdict(report: StudyReport) -> tuple[str, str]:
    found = verdict_of(report)
    return f"{report.rule} Verdict: {found.word}.", found.sentence


POWER_NOTE = (
    "Smallest difference: the true difference that four of five such studies would show, in % of the baseline's loss. "
    "So many test rows, or so many seeds, or both times the factor halve it."
)


def show_power(report: PowerReport, request: StudyRequest, console: Console) -> None:
    """Print the smallest difference that each comparison of a study would see."""
    compared = {(one.method, one.baseline): f"{one.method} against {one.baseline}" for one in report.tasks}
    for pair, title in compared.items():
        console.print(title, soft_wrap=True, markup=False, highlight=False)
        rows = [_power_cells(one) for one in report.tasks if (one.method, one.baseline) == pair]
        heads = ("task", "spread of", "rows", "seeds", "smallest", "half:\nrows", "half:\nseeds", "half:\nboth")
        console.print(terminal_table(heads, rows, names=heads[:2]))
    console.print(POWER_NOTE, soft_wrap=True, markup=False, highlight=False)


def _power_cells(one: TaskPower) -> list[str]:
    alone = ["none" if count is None else f"{count:,}" for count in (one.rows_to_halve, one.seeds_to_halve)]
    counts = [f"{one.rows:,}", str(one.seeds), f"{one.smallest:.2g} %", *alone, f"x {one.factor_to_halve:.1f}"]
    return [one.task, f"{one.measured_on}, {one.measured_seeds} seeds", *counts]


def to_markdown(report: StudyReport) -> str:
    """Markdown with the verdict in sentences, and a table for each task."""
    lines = [f"- {line}" for line in (*_verdict(report), *report.words)]
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
    if names := {name: method for task in report.tasks for method, name in task.names.items()}:
        lines += ["", "| name | method |", "| --- | --- |", *(f"| {name} | `{names[name]}` |" for name in names)]
    return "\n".join(lines) + "\n"


def _row(r: MethodResult, task: TaskResult) -> str:
    compared = "baseline" if r.method == task.baseline else "-"
    if r.difference is not None:
        low, high = r.difference.interval
        compared = f"{r.difference.mean:+z.4f} [{low:+z.4f}, {high:+z.4f}], {r.difference.p:.2g}"
    at_least = ">= " if r.sensitivity.is_basin_cut else ""
    cells = [
        method_text(r.method, task),
        f"{r.rate:g}{'' if r.sensitivity.is_bracketed else ' (end)'}",
        f"{r.test_loss:.4f} ({figure_text(r.deviation, '.4f')})",
        compared,
        f"{r.trained_parameters:,}",
        figure_text(r.served_rank, "d"),
        figure_text(r.served_bytes, ",d"),
        figure_text(r.step_seconds, ".2f"),
        figure_text(gibibytes(r), ".2f"),
        figure_text(r.step_norm, ".3g"),
        figure_text(r.update_norm, ".3g"),
        figure_text(r.fold_error, ".1e"),
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
    return f"{task.shown(method)} (ruler)" if method in task.rulers else task.shown(method)


def figure_text(value: float | None, form: str) -> str:
    """Return a figure, or "-" for None."""
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
