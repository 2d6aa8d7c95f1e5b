"""Descriptions of folders for people: text for a terminal, and an HTML page that begins with plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from rich.console import Console

from loraover.common.provenance import today
from loraover.inspection.report import FolderReport
from loraover.reporting import html_page
from loraover.reporting.palette import Tone
from loraover.reporting.reporter import print_line, print_rows
from loraover.reporting.schedule import MAP
from loraover.reporting.svg import Figure
from loraover.reporting.table import facts_table

TEMPLATE = "inspect.html.j2"
TONES: dict[str, Tone] = {
    "passed": "good",
    "finished": "good",
    "inconclusive": "open",
    "unfinished": "open",
    "failed": "bad",
}
"""Tones of states and verdicts; other words have none."""


def show_folder(report: FolderReport, console: Console) -> None:
    """Print what a folder is and what was trained."""
    print_rows(console, [("folder", report.path), ("kind", report.kind), *folder_rows(report)])


def folder_rows(report: FolderReport) -> Iterator[tuple[str, str]]:
    """Yield what was trained, as names and values."""
    run, adapter, cores, vllm, onnx = report.run, report.adapter, report.cores, report.vllm, report.onnx
    if run is not None:
        step = "" if run.checkpoint_step is None else f", with a checkpoint at step {run.checkpoint_step}"
        yield "state", run.state + (step if run.result is None else "")
        if run.failure is not None:
            yield f"failure ({run.failure.kind})", run.failure.message
        asked: Mapping[str, str | None] = {"method": run.method, "base model": run.model, "training data": run.data}
        facts = run.result.facts() if run.result is not None else asked
        yield from ((name, value) for name, value in facts.items() if value is not None)
        if run.last_loss is not None:
            yield "training loss", f"{run.last_loss:.4f} (last in the log)"
    if adapter is not None:
        if run is None:  # a run has named its base model
            yield "base model", adapter.base_model or "not named"
        ranks = ", ".join(map(str, adapter.ranks)) or "unknown"
        yield "adapter", ", ".join([adapter.kind, *adapter.variants, f"rank {ranks}, alpha {adapter.lora_alpha:g}"])
        yield "targets", f"{', '.join(adapter.targets)} ({adapter.modules} modules)"
        yield "parameters", f"{adapter.parameters:,} ({', '.join(adapter.dtypes)})"
    if cores is not None:
        yield "decomposition", cores.decomposition
        yield "matrices with cores", f"{cores.sites}"
        yield "steps", f"{cores.step}{'' if cores.steps is None else f' of {cores.steps}'}"
        yield "optimizer", cores.optimizer or "no state"
    if vllm is not None:
        yield "served model", vllm.served_model
        yield "rules of vLLM", vllm.vllm_version
        if vllm.max_lora_rank is not None:
            yield "--max-lora-rank", f"{vllm.max_lora_rank}"
    if onnx is not None:
        yield "base model", onnx.base_model
        yield "graph", f"{onnx.mode}, {onnx.precision}"
        yield "adapters", ", ".join(onnx.adapters)
        yield "check", onnx.verdict
    yield from report.verdicts.items()


def show_next_steps(report: FolderReport, console: Console) -> None:
    """Print the commands that take a folder further."""
    if report.next_steps:
        print_line(console, "Next:")
    for step in report.next_steps:
        print_line(console, f"  {step.what}:")
        print_line(console, f"    {step.command}")


def to_page(report: FolderReport, figures: Sequence[Figure], command: str) -> html_page.Page:
    """Make the page of a folder with the figures of its schedule; every text is escaped."""
    trained_on = None if report.run is None or report.run.result is None else report.run.result.hardware
    adapter, cores = report.adapter, report.cores
    return html_page.make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Folder: {report.kind}",
        heading="What is this folder?",
        verdict=verdict_of(report),
        facts={
            "folder": report.path,
            "base model": None if adapter is None else adapter.base_model,
        },
        origin=html_page.Origin(command, today(), trained_on or "", {} if cores is None else cores.versions),
        figures=figures,
        map=[figure for figure in figures if figure.name == MAP],
        scores=[figure for figure in figures if figure.name != MAP],
        table=facts_table(list(folder_rows(report))),
        next_steps=report.next_steps,
    )


def verdict_of(report: FolderReport) -> html_page.Verdict:
    """Return what a folder is, how far its run has come, and what its certificates say."""
    run, adapter, cores = report.run, report.adapter, report.cores
    kind = f"{'An' if report.kind[0] in 'aeiouO' else 'A'} {report.kind}"
    states, sentences = list(report.verdicts.values()), [f"{kind}."]
    if adapter is not None:
        ranks = ", ".join(map(str, adapter.ranks)) or "unknown"
        on = f"{adapter.kind} of rank {ranks} on {adapter.modules} modules, {adapter.parameters:,} numbers"
        sentences = [f"{kind}: {on}."]
    if run is not None:
        states.append(run.state)
        if run.failure is not None and run.state == "failed":
            sentences.append(f"The run failed: {run.failure.message.rstrip('.')}.")
        elif run.result is None:
            step = "" if run.checkpoint_step is None else f"; its newest checkpoint is of step {run.checkpoint_step}"
            sentences.append(f"The run is not finished{step}.")
        else:
            measures = (("before", run.result.before), ("after", run.result.after))
            losses = [f"{found.loss:.4f} {when} training" for when, found in measures if found is not None]
            held_out = f"; held-out loss {', '.join(losses)}" if losses else ""
            sentences.append(f"The run is finished, after {run.result.steps} steps{held_out}.")
    if cores is not None:
        total = "" if cores.steps is None else f" of {cores.steps}"
        sentences.append(f"{cores.sites} matrices have cores ({cores.decomposition}), after {cores.step}{total} steps.")
    if report.onnx is not None:
        states.append(report.onnx.verdict)
        sentences.append(f"The check in ONNX Runtime: {report.onnx.verdict}.")
    if report.vllm is not None:
        sentences.append(f"Checked against the loading rules of vLLM {report.vllm.vllm_version}.")
    sentences += [f"{name}: {verdict}." for name, verdict in report.verdicts.items()]
    tones = [TONES[state] for state in states if state in TONES]
    tone = max(tones, key=("good", "open", "bad").index, default=None)
    return html_page.Verdict(tone or "plain", report.kind, " ".join(sentences))
