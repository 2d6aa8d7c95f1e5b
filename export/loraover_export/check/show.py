"""A report of a check as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from rich.console import Console

from loraover.common.command_line import printable
from loraover_export.check.report import CheckReport, EngineCheck, Finding, Judgement

WIDTH = 80
COLUMNS = "{:<10}{:<16}{:<16}{}"
STYLES = {"right": "green", "refused": "yellow", "wrong silently": "red"}


def show_report(report: CheckReport, console: Console) -> None:
    """Print a table of verdicts, then what each rests on and the export that mends it."""
    ranks = ", ".join(map(str, report.ranks)) or "unknown"
    _line(console, f"{report.adapter}: {report.peft_type}, {report.modules} modules, rank {ranks}")
    _line(console, f"base model {report.base_model} ({report.architecture})")
    console.print()
    _line(console, COLUMNS.format("engine", "as it is", "as exported", "reader"), "bold")
    for check in report.engines:
        row = COLUMNS.format(check.engine, check.as_it_is.verdict, check.exported.verdict, check.reader)
        _line(console, row, STYLES[check.as_it_is.verdict])
    for check in report.engines:
        lines = list(_explained(check))
        if lines:
            console.print()
            _line(console, check.engine, "bold")
        for line in lines:
            _line(console, line)
    console.print()
    wrong = [check.engine for check in report.engines if check.as_it_is.verdict != "right"]
    _line(
        console,
        f"check {report.verdict}: " + (f"not right as it is: {', '.join(wrong)}" if wrong else "right as it is"),
        "green" if report.passed else "red",
    )


def _explained(check: EngineCheck) -> Iterator[str]:
    """Yield the findings on both forms, those that are the same once, and what mends them."""
    shared = [finding for finding in check.as_it_is.findings if finding in check.exported.findings]
    for title, judgement in (("as it is", check.as_it_is), ("exported", check.exported)):
        for finding in judgement.findings:
            if finding not in shared:
                yield from _wrapped(title, finding)
    for finding in shared:
        yield from _wrapped("both", finding)
    if check.is_mended:
        yield "  mended by:"
        yield f"    {check.export}"
    elif check.as_it_is.verdict != "right":
        yield from wrap(f"no export mends this: {_advice(check.exported)}", WIDTH - 4, initial_indent="  ")


def _advice(exported: Judgement) -> str:
    features = {finding.feature for finding in exported.findings if finding.level != "note"}
    if features & {"missing modules", "other shapes", "modules", "shapes"}:
        return "name the model that the adapter was trained on with --model"
    if features & {"initialisation"}:
        return "save it again with PEFT's path_initial_model_for_weight_conversion"
    return "train a plain LoRA, or merge the adapter into the base model with PEFT"


def _wrapped(title: str, finding: Finding) -> list[str]:
    text = f"{title}, {finding.level}: {finding.feature}: {finding.found}"
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
