"""A report of a check as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from rich.console import Console

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_export.check.report import CheckReport, EngineCheck, Finding
from loraover_export.check.request import CheckRequest

WIDTH = 80
COLUMNS = "{:<10}{:<16}{:<16}{}"


def show_report(report: CheckReport, request: CheckRequest, console: Console) -> None:
    """Print a table of verdicts, then what each rests on and the export that mends it."""
    ranks = ", ".join(map(str, report.ranks))
    matrices = f"A and B of {report.modules} modules, rank {ranks}" if report.ranks else "no A and B"
    print_line(console, f"{request.adapter}: {report.peft_type}, {matrices}")
    print_line(console, f"base model {report.base_model} ({report.architecture})")
    console.print()
    print_line(console, COLUMNS.format("engine", "exported by us", "as it is", "reader"), "bold")
    for check in report.engines:
        row = COLUMNS.format(check.engine, check.by_us.verdict, check.as_it_is.verdict, check.reader)
        print_line(console, row, terminal_color(_verdict(check)))
    for check in report.engines:
        lines = list(_explained(check))
        if lines:
            console.print()
            print_line(console, check.engine, "bold")
        for line in lines:
            print_line(console, line)
    _show_limits(report, console)
    console.print()
    wrong = [check.engine for check in report.engines if not check.is_served]
    exported = [check.engine for check in report.engines if _verdict(check) == "right as exported"]
    texts = [f"no form suits {', '.join(wrong)}"] if wrong else []
    texts += [f"only the exported form suits {', '.join(exported)}"] if exported else []
    color = "red" if not report.passed else terminal_color("right on some" if texts else "right")
    print_line(console, f"check {report.verdict}: {'; '.join(texts) or 'served by every engine'}", color)


def _verdict(check: EngineCheck) -> str:
    """Return the verdict that the colour of an engine's line stands for."""
    if check.as_it_is.verdict == "right":
        return "right"
    return "right as exported" if check.is_served else check.by_us.verdict


def _explained(check: EngineCheck) -> Iterator[str]:
    """Yield the findings on the adapter as it is, and the export that mends them."""
    for finding in check.as_it_is.findings:
        yield from _wrapped(f"{finding.level}: {finding.found}")
    if check.is_mended:
        for finding in check.by_us.findings:
            if finding.feature == "conversion":
                yield from _wrapped(finding.found)
        yield "  mended by:"
        for command in filter(None, (check.conversion, check.export)):
            yield f"    {command}"


def _show_limits(report: CheckReport, console: Console) -> None:
    """Print what keeps an export from mending an adapter, each reason once with its engines."""
    limits: dict[Finding, list[str]] = {}
    for check in report.engines:
        for finding in check.by_us.findings:
            if check.as_it_is.verdict != "right" and finding.level != "note":
                limits.setdefault(finding, []).append(check.engine)
    if not limits:
        return
    console.print()
    print_line(console, "no export mends", "bold")
    for finding, engines in limits.items():
        for line in _wrapped(f"{', '.join(engines)}: {finding.found}"):
            print_line(console, line)
    for line in _wrapped(_advice({finding.feature for finding in limits})):
        print_line(console, line)


def _advice(features: set[str]) -> str:
    if features & {"missing modules", "other shapes", "modules", "shapes"}:
        return "Name the model that the adapter was trained on with --model."
    if features == {"files"}:
        return "Save the adapter with PEFT's save_pretrained, or mend its files as the message says."
    if "initialisation" in features:
        return (
            "Save the adapter again with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )
    if features & {"method", "DoRA"}:
        return (
            "Approximate it with `loraover export convert` and --approximate-to-rank, which states the error, or merge "
            "the adapter into the base model with PEFT."
        )
    return "Train a plain LoRA, or merge the adapter into the base model with PEFT."


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
