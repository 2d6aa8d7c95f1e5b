"""The description of a folder as one HTML page that needs no network, with what it is in plain sentences above."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from loraover.common.provenance import today
from loraover.inspection.report import CoreFacts, FolderReport, RunFacts
from loraover.inspection.show import folder_rows
from loraover.reporting.html_page import Origin, Page, Table, Verdict, make_page
from loraover.reporting.palette import Tone
from loraover.reporting.schedule_figures import MAP
from loraover.reporting.svg import Figure

TEMPLATE = "inspect.html.j2"
BAD = ("failed",)
OPEN = ("inconclusive", "unfinished")


def to_page(report: FolderReport, figures: Sequence[Figure], command: str) -> Page:
    """Make the page of a folder; every text is escaped.

    Args:
        report: Description of the folder.
        figures: Figures of its schedule; empty without cores.
        command: Command line that makes the page.
    """
    trained_on = None if report.run is None or report.run.result is None else report.run.result.hardware
    adapter, cores = report.adapter, report.cores
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Folder: {report.kind}",
        heading="What is this folder?",
        verdict=verdict_of(report),
        facts={
            "folder": report.path,
            "base model": None if adapter is None else adapter.base_model,
        },
        origin=Origin(command, today(), trained_on or "", {} if cores is None else cores.versions),
        figures=figures,
        map=[figure for figure in figures if figure.name == MAP],
        scores=[figure for figure in figures if figure.name != MAP],
        table=Table(("what", "value"), list(folder_rows(report)), ("what", "value"), ("value",)),
        next_steps=report.next_steps,
    )


def verdict_of(report: FolderReport) -> Verdict:
    """Return what a folder is, how far its run has come, and what its certificates say.

    Args:
        report: Description of the folder.
    """
    states = list(report.verdicts.values())
    sentences = [_kind(report)]
    if report.run is not None:
        states.append(report.run.state)
        sentences += _run(report.run)
    if report.cores is not None:
        sentences.append(_cores(report.cores))
    if report.onnx is not None:
        states.append(report.onnx.verdict)
        sentences.append(f"The check in ONNX Runtime: {report.onnx.verdict}.")
    if report.vllm is not None:
        sentences.append(f"Checked against the loading rules of vLLM {report.vllm.vllm_version}.")
    sentences += [f"{name}: {verdict}." for name, verdict in report.verdicts.items()]
    return Verdict(_tone(states), report.kind, " ".join(sentences))


def _tone(states: list[str]) -> Tone | Literal["plain"]:
    if any(state in BAD for state in states):
        return "bad"
    if any(state in OPEN for state in states):
        return "open"
    return "good" if any(state in ("passed", "finished") for state in states) else "plain"


def _kind(report: FolderReport) -> str:
    article = "An" if report.kind[0] in "aeiouO" else "A"
    adapter = report.adapter
    if adapter is None:
        return f"{article} {report.kind}."
    ranks = ", ".join(map(str, adapter.ranks)) or "unknown"
    return (
        f"{article} {report.kind}: {adapter.kind} of rank {ranks} on {adapter.modules} modules, "
        f"{adapter.parameters:,} numbers."
    )


def _run(run: RunFacts) -> list[str]:
    if run.failure is not None and run.state == "failed":
        return [f"The run failed: {run.failure.message.rstrip('.')}."]
    if run.result is None:
        step = "" if run.checkpoint_step is None else f"; its newest checkpoint is of step {run.checkpoint_step}"
        return [f"The run is not finished{step}."]
    measures = (("before", run.result.before), ("after", run.result.after))
    losses = [f"{found.loss:.4f} {when} training" for when, found in measures if found is not None]
    steps = f"The run is finished, after {run.result.steps} steps"
    return [f"{steps}; held-out loss {', '.join(losses)}." if losses else f"{steps}."]


def _cores(cores: CoreFacts) -> str:
    total = "" if cores.steps is None else f" of {cores.steps}"
    return f"{cores.sites} matrices have cores ({cores.decomposition}), after {cores.step}{total} steps."
