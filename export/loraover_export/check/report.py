"""Each engine's verdict on an adapter, as it is and as exported, and its text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import Literal

from pydantic import Field
from rich.console import Console

from loraover.adapters.verdict import Proof
from loraover.common.request import Request
from loraover.common.strict_json import StrictModel
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line

WIDTH = 80
COLUMNS = "{:<10}{:<16}{:<16}{}"

Level = Literal["refused", "wrong silently", "note"]
Verdict = Literal["right", "refused", "wrong silently"]


class EngineFinding(StrictModel):
    """Fact about an adapter on an engine."""

    feature: str = Field(description="Property of the adapter, or name of the rule")
    level: Level = Field(description="What the engine does; a note does not change the verdict")
    found: str = Field(description="What was found, and what the engine does with it, in words")


class Treatment(StrictModel):
    """Treatment of one form of an adapter by an engine."""

    verdict: Verdict = Field(description="The worst of the findings; a refusal outweighs a silent error")
    findings: tuple[EngineFinding, ...] = Field(description="The facts that the verdict rests on")


class EngineCheck(StrictModel):
    """Engine with both forms of the adapter, and the command that writes the second."""

    engine: str = Field(description="Name that --engine takes")
    reader: str = Field(description="Program that reads the adapter, with the release whose sources were read")
    as_it_is: Treatment = Field(description="The adapter's folder, in PEFT's form")
    exported: Treatment = Field(description="What the export command writes of the adapter")
    converted: Treatment | None = Field(
        description="What the export command writes of the adapter's conversion; None if the export needs none, or if "
        "there is no exact one"
    )
    conversion: str | None = Field(description="Command that converts the adapter; None where `converted` is None")
    export: str = Field(description="Command that writes the exported form, of the conversion where there is one")
    known_faults: tuple[str, ...] = Field(
        default=(), description="Known faults of the engine, whatever the adapter; they change no verdict"
    )

    @property
    def by_us(self) -> Treatment:
        """The adapter as exported by us: after a conversion where the export needs one."""
        return self.exported if self.converted is None else self.converted

    @property
    def commands(self) -> str:
        """Command line that writes the form of `by_us`."""
        return self.export if self.conversion is None else f"{self.conversion} && {self.export}"

    @property
    def is_served(self) -> bool:
        """Whether the engine is right on the adapter as exported by us, or as it is."""
        return "right" in (self.by_us.verdict, self.as_it_is.verdict)

    @property
    def is_mended(self) -> bool:
        """Whether the export repairs the adapter's faults on the engine."""
        return self.as_it_is.verdict != "right" and self.by_us.verdict == "right"

    @property
    def form(self) -> str:
        """The verdict on the better form, and "right as exported" where only the export is right."""
        if self.as_it_is.verdict == "right":
            return "right"
        return "right as exported" if self.is_served else self.by_us.verdict


class CheckReport(Proof):
    """Result of checking an adapter for several engines without running any."""

    schema_version: int = 2
    verdict: Literal["passed", "failed"] = Field(
        description="Failed: an engine that was asked for is right on no form of the adapter; without a choice, every "
        "engine is"
    )
    adapter: str = Field(description="Folder of the adapter")
    peft_type: str = Field(description="PEFT's name of the method")
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class that the base model's configuration names")
    modules: int = Field(description="Number of adapted modules")
    ranks: tuple[int, ...] = Field(description="Ranks of the modules, each once")
    engines: tuple[EngineCheck, ...]


def treatment(findings: Iterable[EngineFinding]) -> Treatment:
    """Return findings with the verdict that follows from them."""
    found = tuple(findings)
    worst: tuple[Verdict, ...] = ("refused", "wrong silently")
    levels = {finding.level for finding in found}
    return Treatment(verdict=next((level for level in worst if level in levels), "right"), findings=found)


def show_report(report: CheckReport, request: Request, console: Console) -> None:
    """Print a table of verdicts, then what each rests on and the export that mends it."""

    def wrapped(text: str) -> None:
        for line in wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False):
            print_line(console, line)

    ranks = ", ".join(map(str, report.ranks))
    matrices = f"A and B of {report.modules} modules, rank {ranks}" if report.ranks else "no A and B"
    print_line(console, f"{report.adapter}: {report.peft_type}, {matrices}")
    print_line(console, f"base model {report.base_model} ({report.architecture})")
    console.print()
    print_line(console, COLUMNS.format("engine", "exported by us", "as it is", "reader"), "bold")
    for check in report.engines:
        row = COLUMNS.format(check.engine, check.by_us.verdict, check.as_it_is.verdict, check.reader)
        print_line(console, row, terminal_color(check.form))
    limits: dict[EngineFinding, list[str]] = {}  # what keeps an export from mending the adapter, with its engines
    for check in report.engines:
        if check.as_it_is.findings or check.is_mended:
            console.print()
            print_line(console, check.engine, "bold")
        for finding in check.as_it_is.findings:
            wrapped(f"{finding.level}: {finding.found}")
        for finding in check.by_us.findings:
            if check.is_mended and finding.feature == "conversion":
                wrapped(finding.found)
            if check.as_it_is.verdict != "right" and finding.level != "note":
                limits.setdefault(finding, []).append(check.engine)
        if check.is_mended:
            print_line(console, "  fixed by:")
            for command in filter(None, (check.conversion, check.export)):
                print_line(console, f"    {command}")
    if any(check.known_faults for check in report.engines):
        console.print()
        print_line(console, "known faults of the engines, whatever the adapter (docs/faults.md)", "bold")
        for check in report.engines:
            if check.known_faults:
                wrapped(f"{check.reader.partition(',')[0]}: {'; '.join(check.known_faults)}")
    if limits:
        console.print()
        print_line(console, "no export fixes", "bold")
        for finding, engines in limits.items():
            wrapped(f"{', '.join(engines)}: {finding.found}")
        wrapped(_advice({finding.feature for finding in limits}))
    console.print()
    wrong = [check.engine for check in report.engines if not check.is_served]
    exported = [check.engine for check in report.engines if check.form == "right as exported"]
    texts = [f"no form suits {', '.join(wrong)}"] if wrong else []
    texts += [f"only the exported form suits {', '.join(exported)}"] if exported else []
    color = "red" if not report.passed else terminal_color("right on some" if texts else "right")
    print_line(console, f"check {report.verdict}: {'; '.join(texts) or 'served by every engine'}", color)


def _advice(features: set[str]) -> str:
    if features & {"missing modules", "other shapes", "modules", "shapes"}:
        return "Name the model that the adapter was trained on with --model."
    if features == {"files"}:
        return "Save the adapter with PEFT's save_pretrained, or correct its files as the message says."
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
