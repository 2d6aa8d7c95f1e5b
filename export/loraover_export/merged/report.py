"""Verdicts on an adapter in merged weights, for every module and for the whole model, and their text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from pydantic import Field
from rich.console import Console

from loraover.adapters.show import show_verdict
from loraover.adapters.verdict import Proof
from loraover.common.provenance import today
from loraover.common.strict_json import StrictModel
from loraover.reporting import html_page
from loraover.reporting.palette import tone_of
from loraover.reporting.reporter import print_line
from loraover.reporting.table import Column, Table, percent
from loraover_export.requests import InspectMergeRequest

ModuleVerdict = Literal[
    "merged",
    "not merged",
    "merged twice",
    "another factor",
    "transposed",
    "rows in another order",
    "another base",
    "other changes",
    "rounded away",
    "nothing to merge",
    "undecided",
    "not compared",
]
GOOD: tuple[ModuleVerdict, ...] = ("merged", "nothing to merge")
OPEN: tuple[ModuleVerdict, ...] = ("rounded away", "undecided", "not compared")
"""Verdicts that prove neither a merge nor a fault."""

TEMPLATE = "merged.html.j2"
SHOWN = 12
NAMED = 3


class ModuleStrength(StrictModel):
    """Adapted module, with the share of its delta that the merged weight holds."""

    module: str = Field(description="Path of the module in the base model")
    verdict: ModuleVerdict = Field(description="What the weight says about the merge")
    dtype: str = Field(description="Number format of the merged weight, such as BF16 or Q4_K")
    strength: float | None = Field(
        default=None, description="Least-squares multiple of delta_W in the merged weight minus the base model's"
    )
    interval: tuple[float, float] | None = Field(
        default=None, description="Interval of the strength, five standard errors to both sides"
    )
    expected: float | None = Field(
        default=None, description="Strength of the file that a right merge writes, after the rounding of its format"
    )
    residual: float | None = Field(
        default=None, description="Norm of what the strength does not explain, over the norm of delta_W"
    )
    rounding: float | None = Field(
        default=None, description="The same for the file that the verdict says was written: the format's own rounding"
    )
    erased: float | None = Field(
        default=None,
        description="Share of the delta's squared norm in elements that a right merge stores as the base; of a large "
        "weight, in a sample of its rows",
    )
    reason: str = Field(default="", description="Cause of the verdict in words; empty for a plain merge")


class ParameterState(StrictModel):
    """Tensor to which no delta is added."""

    name: str = Field(description="Name of the tensor")
    state: Literal["replaced", "left out", "changed", "missing", "added", "resized", "not compared"] = Field(
        description="Replaced: it is the adapter's own, as it should be. Left out: it is still the base model's. "
        "Resized: rows were added to it, such as those of further tokens"
    )
    reason: str = Field(default="", description="What was found, in words")


class InspectMergeReport(Proof):
    """Result of looking for an adapter in merged weights."""

    verdict: Literal["passed", "failed", "inconclusive"] = Field(
        description="Passed: every module holds its delta once, and nothing else changed. Inconclusive: no fault was "
        "found, but not everything could be compared or decided"
    )
    sentence: str = Field(description="Answer in one sentence")
    adapter: str = Field(description="Folder or address of the adapter")
    peft_type: str = Field(description="PEFT's name of the adapter's method")
    merged: str = Field(description="Where the merged weights are")
    base_model: str = Field(description="Where the base model's weights are")
    dtypes: dict[str, int] = Field(description="Number of adapted weights in each number format of the merged model")
    erased: float = Field(
        description="Share of all deltas' squared norm in elements that a right merge stores as the base model's"
    )
    modules: list[ModuleStrength] = Field(description="One entry for each adapted module")
    others: list[ParameterState] = Field(description="Tensors to which no delta is added, and that differ or should")
    equal: int = Field(description="Number of other tensors that are the base model's")
    tokenizer: list[str] = Field(description="Differences of the tokenizers, in sentences")
    not_compared: list[str] = Field(description="What could not be compared, in sentences")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")


def sentence_of(modules: Sequence[ModuleStrength], others: Sequence[ParameterState], tokenizer: Sequence[str]) -> str:
    """Return the answer in one sentence: the state of the modules, then changes of other tensors."""
    counts = Counter(module.verdict for module in modules)
    found = [_some(modules, verdict) for verdict, _ in counts.most_common()]
    if counts.keys() <= set(GOOD) and counts["merged"]:
        strengths = [
            module.strength for module in modules if module.strength is not None and module.verdict == "merged"
        ]
        least, most = min(strengths), max(strengths)
        share = f"all {len(modules)}" if len(counts) == 1 else f"{counts['merged']} of {len(modules)}"
        found = [f"{share} modules hold the adapter once, strength {least:.3f} to {most:.3f}"]
        found += [_some(modules, verdict) for verdict in counts if verdict != "merged"]
    elif len(counts) == 1:
        (verdict,) = counts
        found = [f"all {len(modules)} modules: {_told(modules, verdict)}"]
    states = Counter(other.state for other in others if other.state != "replaced")
    for state, number in states.items():
        names = [other.name for other in others if other.state == state]
        found.append(f"{number} other tensor{'s' * (number != 1)} {state} ({_listed(names)})")
    return "; ".join([*found, *(["the tokenizer differs"] if tokenizer else [])])


def _some(modules: Sequence[ModuleStrength], verdict: ModuleVerdict) -> str:
    names = [module.module for module in modules if module.verdict == verdict]
    return f"{len(names)} of {len(modules)} modules: {_told(modules, verdict)} ({_listed(names)})"


def _told(modules: Sequence[ModuleStrength], verdict: ModuleVerdict) -> str:
    """Return a verdict with its most common reasons; if there are several, with each one's number of modules."""
    reasons = Counter(module.reason for module in modules if module.verdict == verdict and module.reason)
    told = [f"{reason} ({number})" if len(reasons) > 1 else reason for reason, number in reasons.most_common(NAMED)]
    return ", ".join([verdict, *told, *(["and others"] if len(reasons) > NAMED else [])])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def strengths_table(report: InspectMergeReport, rows: Sequence[ModuleStrength]) -> Table[ModuleStrength]:
    """Return the table of modules."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return Table(
        [
            Column("verdict", lambda m: m.verdict, "verdict", verdict=tone_word),
            Column("module", lambda m: m.module, "name"),
            Column("strength", lambda m: number(m.strength, ".3f")),
            Column("interval", lambda m: "-" if m.interval is None else f"{m.interval[0]:.3f} to {m.interval[1]:.3f}"),
            Column("expected", lambda m: number(m.expected, ".3f")),
            Column("residual", lambda m: number(m.residual, ".2g")),
            Column("rounding", lambda m: number(m.rounding, ".2g")),
            Column("erased", lambda m: "-" if m.erased is None else percent(m.erased, 1), is_wide=True),
            Column("format", lambda m: m.dtype),
        ],
        rows,
        f"Strength of the adapter, {len(rows)} of {len(report.modules)} modules",
        note="Strength: the multiple of the adapter's delta in the merged weight minus the base model's. Expected: the "
        "strength of a right merge in this number format. Residual: what the strength does not explain, and rounding: "
        "what the format explains, both over the norm of the delta. Erased: the share of the delta that the format "
        "cannot hold.",
        caption="Residual and rounding: over the norm of the delta.",
    )


def others_table(report: InspectMergeReport) -> Table[ParameterState]:
    """Return the table of the tensors to which no delta is added."""
    return Table(
        [
            Column("tensor", lambda other: other.name, "name"),
            Column("state", lambda other: other.state, "word"),
            Column("found", lambda other: other.reason, "name"),
        ],
        report.others,
        f"Other tensors that differ or should; {report.equal} are the base model's",
    )


def to_page(report: InspectMergeReport, command: str) -> html_page.Page:
    """Make the page, with the command line that makes it again; every text is escaped."""
    lines = [f"{clause[:1].upper()}{clause[1:]}." for clause in html_page.clauses(report.sentence)]
    if report.erased:
        lines.append(
            f"A right merge into {', '.join(sorted(report.dtypes))} erases {report.erased:.2%} of the adapter."
        )
    return html_page.make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Merge: is the adapter in these weights?",
        heading="Is this adapter in these weights?",
        verdict=html_page.Verdict(tone_of(report.verdict), report.verdict, "\n".join(lines)),
        facts={"adapter": report.adapter, "merged model": report.merged, "base model": report.base_model},
        origin=html_page.Origin(command, today(), "", report.versions),
        strengths=strengths_table(report, report.modules),
        others=others_table(report),
        sentences=[*report.tokenizer, *(f"Not compared: {line}." for line in report.not_compared)],
    )


def tone_word(module: ModuleStrength) -> str:
    """Return the verdict of a report whose colour a module's verdict takes."""
    return "passed" if module.verdict in GOOD else "inconclusive" if module.verdict in OPEN else "failed"


def show_report(report: InspectMergeReport, request: InspectMergeRequest, console: Console) -> None:
    """Print the modules that are furthest from a right merge, other differences, and the verdict."""

    def badness(module: ModuleStrength) -> tuple[int, float]:
        order = ("failed", "inconclusive", "passed").index(tone_word(module))
        return order, -abs((module.strength or 0.0) - (module.expected or 0.0))

    console.print(strengths_table(report, sorted(report.modules, key=badness)[:SHOWN]))
    for other in report.others:
        print_line(console, f"{other.name}: {other.state}{other.reason and f', {other.reason}'}")
    for line in (*report.tokenizer, *(f"not compared: {line}" for line in report.not_compared)):
        print_line(console, line, "yellow")
    if report.erased:
        dtypes = ", ".join(sorted(report.dtypes))
        print_line(
            console,
            f"a right merge into {dtypes} erases {report.erased:.2%} of the adapter (squared norm in elements that "
            "stay as they were)",
        )
    if request.html is not None:
        print_line(console, f"wrote {request.html}")
    show_verdict(report, f"inspect-merge {report.verdict}: {report.sentence}", console)
