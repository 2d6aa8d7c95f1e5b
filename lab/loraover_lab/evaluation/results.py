"""Results of an evaluation: the JSON file, and a table for people."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from scipy.stats import binomtest

from loraover.common.strict_json import StrictModel
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table
from loraover_lab.evaluation.base import Example

if TYPE_CHECKING:
    from rich.console import Console

CORRELATIONS = ("mcc",)  # measures from -1 to 1, where others are shares from 0 to 1


class ModelResult(StrictModel):
    """Result of one model."""

    name: str = Field(description="'base', or the adapter as the user named it.")
    sha256: str | None = Field(None, description="SHA-256 of the adapter's configuration and tensors.")
    measures: dict[str, float] = Field(default_factory=dict, description="Value of each measure.")
    interval: tuple[float, float] | None = Field(None, description="95 % interval of the share of right answers.")
    missing: int = Field(0, description="Number of examples without a score.")
    examples: list[Example] = Field(default_factory=list, description="Answers; with a failure, those without ratings.")
    seconds: float = Field(0.0, description="Seconds that the answers and their scores took.")
    failure: str | None = Field(None, description="Reason why there are no measures; None if there are some.")


class Evaluation(StrictModel):
    """Contents of the file that `loraover eval` writes."""

    schema_version: Literal[1] = 1
    task: str = Field(description="Name of the benchmark.")
    model: str = Field(description="Base model, as the user named it.")
    model_origin: str = Field(description="Base model with its commit or folder, for people.")
    model_digest: str | None = Field(
        None,
        description="Base model's commit on the hub, or SHA-256 of its folder's files; None if no file is written.",
    )
    data_origin: str = Field(description="Questions with their commit or file, for people.")
    data_sha256: str = Field(description="SHA-256 of the questions as they were asked.")
    questions: int = Field(description="Number of questions.")
    is_right_or_wrong: bool = Field(description="Whether a score is 1 or 0.")
    settings: dict[str, str] = Field(description="Prompt, engine, judge and other settings behind the figures.")
    versions: dict[str, str] = Field(description="Versions of Python and of the libraries.")
    hardware: str = Field(description="Processor and accelerator.")
    command: str = Field(description="Command line of the evaluation.")
    results: list[ModelResult] = Field(
        default_factory=list, description="Result of each model, the base model's first."
    )

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if a model failed, else 0."""
        return int(any(result.failure for result in self.results))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, Journal of the American Statistical Association 22)."""
    interval = binomtest(right, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def show_evaluation(found: Evaluation, console: Console) -> None:
    """Print one row for each model, then the settings and the failures."""
    console.print(results_table(found))
    settings = "; ".join(f"{name}: {value}" for name, value in found.settings.items())
    print_line(console, f"{found.model_origin}; {settings}")
    for result in found.results:
        if result.failure is not None:
            print_line(console, f"{result.name} failed: {result.failure}")


def results_table(found: Evaluation) -> Table[ModelResult]:
    """Return a table with one row for each model."""

    def measure(name: str) -> Column[ModelResult]:
        form = ".1%" if found.is_right_or_wrong and name not in CORRELATIONS else ".2f"
        return Column(name, lambda r: format(r.measures[name], form) if name in r.measures else "-")

    def interval(result: ModelResult) -> str:
        return "-" if result.interval is None else "{:.1%} to {:.1%}".format(*result.interval)

    def changed(result: ModelResult, sign: int) -> str:
        """Number of questions whose score is above the base model's, or below it where `sign` is -1."""
        base, mine = found.results[0].examples, result.examples
        if not base or not mine or mine is base:
            return "-"
        return str(sum(sign * ((a.score or 0) - (b.score or 0)) > 0 for a, b in zip(mine, base, strict=True)))

    names = dict.fromkeys(name for result in found.results for name in result.measures)
    last: list[Column[ModelResult]] = [Column("missing", lambda r: str(r.missing))]
    if found.is_right_or_wrong:
        gained, lost = (partial(changed, sign=sign) for sign in (1, -1))
        last = [Column("right, 95 %", interval), Column("gained", gained), Column("lost", lost)]
    title = f"{found.task}, {found.questions} questions from {found.data_origin}"
    return Table([Column("model", lambda r: r.name, "name"), *map(measure, names), *last], found.results, title)
