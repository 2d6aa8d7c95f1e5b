"""A study's report for people, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rich.console import Console

from loraover.reporting.html_page import Table
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table
from loraover.training.plan import ASSUMPTION, size_text
from loraover_lab.study.plan import StudyPlan
from loraover_lab.study.power import ENOUGH_SEEDS, PowerReport, TaskPower
from loraover_lab.study.report import MethodResult, StudyReport, TaskResult, signed
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.verdict import verdict_of

REPORT_FILE, TABLE_FILE, HTML_FILE = "study.json", "study.md", "study.html"
COSTS = ("trained", "served rank", "served bytes", "s / step", "GiB", "step norm", "update norm", "fold error")
COLUMNS = ("method", "rate", "test loss (sd)", "difference [95 %], p", *COSTS, "basin", "regret")
END_NOTE = " (end): the best rate is at an end of the sweep."


def show_study(report: StudyReport, request: StudyRequest, console: Console) -> None:
    """Print what the figures say, and which files hold them."""
    written = f"wrote {request.output / HTML_FILE}, {TABLE_FILE} and {REPORT_FILE}"
    if (scores := scores_table(report)) is not None:
        console.print(terminal_table(scores.columns, scores.rows, names=scores.words, title=score_title(report)))
    for line in (*_verdict(report), *report.words, written):
        print_line(console, line)


def _verdict(report: StudyReport) -> tuple[str, str]:
    found = verdict_of(report)
    return f"{report.rule} Verdict: {found.word}.", found.sentence


OTHER_SCORES = {"mtbench": "mean rating, 1 to 10", "cola": "Matthews correlation in %"}
"""Names of the scores of benchmarks that do not count right answers."""


def score_title(report: StudyReport) -> str:
    """Say what the scores are of."""
    scores = report.scores
    kind = OTHER_SCORES.get(scores.benchmark or "", "right answers in %")
    without = f"; answers without a rating, which do not count: {scores.unrated}" if scores.unrated else ""
    return f"{scores.benchmark or 'Held-out rows'}: {kind}, mean (sd) of {seeds_text(report)}{without}"


def scores_table(report: StudyReport) -> Table | None:
    """Return the methods' scores, one column a task, as papers print them; None without any."""
    scores: dict[str, dict[str, str]] = {}
    means: dict[str, list[float]] = {}
    for task in report.tasks:
        if task.task in report.scores.untrained:
            scores.setdefault("untrained", {})[task.task] = f"{report.scores.untrained[task.task]:.2f}"
        for one in task.methods:
            if one.score is not None:
                deviation = "" if one.score_deviation is None else f" ({one.score_deviation:.2f})"
                scores.setdefault(method_text(one.method, task), {})[task.task] = f"{one.score:.2f}{deviation}"
                means.setdefault(method_text(one.method, task), []).append(one.score)
    if not means:
        return None
    tasks = [task.task for task in report.tasks]
    whole = {method: fmean(found) for method, found in means.items() if len(found) == len(tasks)}
    rows = [[method, *(cells.get(task, "-") for task in tasks)] for method, cells in scores.items()]
    if len(tasks) > 1:
        tasks, rows = [*tasks, "mean"], [[*row, figure_text(whole.get(row[0]), ".2f")] for row in rows]
    return Table(("method", *tasks), rows, ("method",), ("method",))


POWER_NOTE = (
    "Smallest difference: the true difference that four of five such studies would show, in % of the baseline's loss, "
    "for one task; the correction for five tasks makes it a fifth larger. The last three columns say what halves it: "
    "this number of test rows, this number of seeds, or both multiplied by this factor; none: no number does."
)


def show_power(report: PowerReport, request: StudyRequest, console: Console) -> None:
    """Print the smallest difference that each comparison of a study would see."""
    compared = {(one.method, one.baseline): f"{one.method} against {one.baseline}" for one in report.tasks}
    for pair, title in compared.items():
        print_line(console, title)
        rows = [_power_cells(one) for one in report.tasks if (one.method, one.baseline) == pair]
        heads = ("task", "spread of", "rows", "seeds", "smallest", "half:\nrows", "half:\nseeds", "half:\nboth")
        console.print(terminal_table(heads, rows, names=heads[:2]))
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


def _power_cells(one: TaskPower) -> list[str]:
    alone = ["none" if count is None else f"{count:,}" for count in (one.rows_to_halve, one.seeds_to_halve)]
    counts = [f"{one.rows:,}", str(one.seeds), f"{one.smallest:.2g} %", *alone, f"x {one.factor_to_halve:.1f}"]
    return [one.task, f"{one.measured_on}, {one.measured_seeds} seeds", *counts]


def show_study_plan(plan: StudyPlan, request: StudyRequest, console: Console) -> None:
    """Print the runs of each method on each task with their needs, and the sum."""
    heads = ("task", "method", "runs", "steps", "memory", "s / step", "time")
    rows = [
        (
            *(one.task, one.method, str(one.runs), f"{one.steps:,}"),
            f"{'over ' if one.activations is None else ''}{size_text(one.held_bytes + (one.activations or 0))}",
            *(figure_text(one.step_seconds, ".2g"), "-" if one.hours is None else hours_text(one.hours)),
        )
        for one in plan.methods
    ]
    console.print(terminal_table(heads, rows, names=heads[:2]))
    time = "time is predicted only if this machine can run a trial."
    if plan.hours is not None:
        time = f"{hours_text(plan.hours)} of training, one run after another. Evaluation comes on top."
        time += " Where the data are on the hub, that is an upper bound: all examples at full length."
    print_line(console, f"{plan.runs} runs; {time} {ASSUMPTION}")


def hours_text(hours: float) -> str:
    """Return a duration in hours, or in minutes where it is less than one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{math.ceil(60 * hours)} min"


def to_markdown(report: StudyReport) -> str:
    """Markdown with the verdict in sentences, and a table for each task."""
    lines = [f"- {line}" for line in (*_verdict(report), *report.words)]
    if not report.is_whole:
        lines.append(f"- {unfinished(report)}")
    if (scores := scores_table(report)) is not None:
        lines += ["", "### Scores", "", f"{score_title(report)}.", ""]
        lines += _table(scores.columns, scores.rows)
        lines += ["", "Our choices, where the paper's abstract is silent:", ""] if report.scores.choices else []
        lines += [f"- {choice}" for choice in report.scores.choices]
    for task in report.tasks:
        lines += ["", f"### {task.task}", "", f"{task.examples} test examples, {seeds_text(report)}.{END_NOTE}", ""]
        lines += _table(COLUMNS, [_cells(result, task) for result in task.methods])
        lines += [f"- {line}" for line in task.failures]
    if report.names:
        lines += ["", "| name | method |", "| --- | --- |"]
        lines += [f"| {name} | `{method}` |" for name, method in report.names.items()]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of numbers with names in front."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def _cells(r: MethodResult, task: TaskResult) -> list[str]:
    compared = "baseline" if r.method == task.baseline else "-"
    if r.difference is not None:
        mean, low, high = signed((r.difference.mean, *r.difference.interval), 4)
        compared = f"{mean} [{low}, {high}], {r.difference.p:.2g}"
    at_least = ">= " if r.sensitivity.is_basin_cut else ""
    return [
        method_text(r.method, task),
        f"{r.rate:g}{'' if r.sensitivity.is_bracketed else ' (end)'}",
        f"{r.test_loss:.4f} ({figure_text(r.deviation, '.4f')})",
        compared,
        *cost_cells(r),
        f"{at_least}{r.sensitivity.basin_decades:.2f}",
        regret_text(r),
    ]


def seeds_text(report: StudyReport) -> str:
    """Number of seeds, and how many of them chose the rates."""
    seeds = f"{report.seeds} seed{'' if report.seeds == 1 else 's'}"
    if report.tuning_seeds is None:
        return seeds
    first = "" if report.tuning_seeds == 1 else f" {report.tuning_seeds}"
    return f"{seeds}, the first{first} of which chose the rates"


def method_text(method: str, task: TaskResult) -> str:
    """Name of a method; rulers are marked."""
    return f"{task.shown(method)} (ruler)" if method in task.rulers else task.shown(method)


def figure_text(value: float | None, form: str) -> str:
    """Return a figure, or "-" for None."""
    return "-" if value is None else format(value, form)


def cost_cells(r: MethodResult) -> list[str]:
    """Return the cells of the columns `COSTS`."""
    return [
        f"{r.trained_parameters:,}",
        figure_text(r.served_rank, "d"),
        figure_text(r.served_bytes, ",d"),
        figure_text(r.step_seconds, ".2f"),
        figure_text(None if r.peak_bytes is None else r.peak_bytes / 2**30, ".2f"),
        figure_text(r.step_norm, ".3g"),
        figure_text(r.update_norm, ".3g"),
        figure_text(r.fold_error, ".1e"),
    ]


def regret_text(r: MethodResult) -> str:
    """Regret in percent, or "infinite" where a rate diverged."""
    found = r.sensitivity
    if found.regret is not None:
        return f"{found.regret:.2%}"
    return f"infinite ({found.diverged} of {found.diverged + len(found.losses)} rates failed)"


def unfinished(report: StudyReport) -> str:
    """Sentence for a report of a study that is still running."""
    return f"The study is not finished: {report.runs} runs are done, and only the first {report.seeds} seeds count."
