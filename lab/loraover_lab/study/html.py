"""A study as one HTML page that needs no network."""

from __future__ import annotations

from importlib.resources import files

from loraover.reporting.html_page import Origin, Page, Table, make_page
from loraover_lab.study.figures import forest, rate_figures
from loraover_lab.study.report import MethodResult, StudyReport, TaskResult, signed, standing
from loraover_lab.study.show import (
    COSTS,
    END_NOTE,
    cost_cells,
    figure_text,
    method_text,
    regret_text,
    score_title,
    scores_table,
    seeds_text,
    unfinished,
)
from loraover_lab.study.verdict import changes, verdict_of

TEMPLATE = "study.html.j2"


def to_page(report: StudyReport) -> Page:
    """Make the page of a study; every text is escaped.

    Args:
        report: The study.
    """
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
        tasks=[(task, _methods_table(task), _costs_table(task)) for task in report.tasks],
        unfinished=None if report.is_whole else unfinished(report),
        end_note=END_NOTE,
        scores=scores_table(report),
        score_title=score_title(report),
    )


def _methods_table(task: TaskResult) -> Table:
    rows = [
        (
            *(_verdict(r, task), method_text(r.method, task)),
            f"{r.rate:g}{'' if r.sensitivity.is_bracketed else ' (end)'}",
            *(f"{r.test_loss:.4f}", figure_text(r.deviation, ".4f"), *_compared(r)),
            f"{'at least ' if r.sensitivity.is_basin_cut else ''}{r.sensitivity.basin_decades:.2f}",
            regret_text(r),
        )
        for r in task.methods
    ]
    columns = (
        *("verdict", "method", "rate", "test loss", "sd", "difference", "95 % interval", "p"),
        *("basin, decades", "mean regret"),
    )
    return Table(columns, rows, columns[:2], ("method",))


def _verdict(r: MethodResult, task: TaskResult) -> str:
    if r.difference is None:
        return "baseline" if r.method == task.baseline else "-"
    return standing(task, r)[0]


def _compared(r: MethodResult) -> tuple[str, str, str]:
    if r.difference is None:
        return "-", "-", "-"
    mean, low, high = signed((r.difference.mean, *r.difference.interval), 4)
    return mean, f"{low} to {high}", f"{r.difference.p:.2g}"


def _costs_table(task: TaskResult) -> Table:
    rows = [(method_text(r.method, task), *cost_cells(r)) for r in task.methods]
    return Table(("method", *COSTS), rows, ("method",), ("method",))
