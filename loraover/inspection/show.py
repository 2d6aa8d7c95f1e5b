"""Descriptions of folders and installations, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from loraover.inspection.installation import Installation
from loraover.inspection.request import DoctorRequest
from loraover.reporting.reporter import print_line, print_rows

if TYPE_CHECKING:
    from loraover.inspection.report import AdapterFacts, CoreFacts, FolderReport, OnnxFacts, RunFacts, VllmFacts

Rows = Iterator[tuple[str, str]]


def show_folder(report: FolderReport, console: Console) -> None:
    """Print what a folder is and what was trained."""
    print_rows(console, [("folder", report.path), ("kind", report.kind), *folder_rows(report)])


def folder_rows(report: FolderReport) -> list[tuple[str, str]]:
    """Return what was trained, as names and values."""
    adapter = [] if report.adapter is None else list(_adapter_rows(report.adapter))
    return [
        *([] if report.run is None else _run_rows(report.run)),
        *(adapter if report.run is None else adapter[1:]),  # a run has named its base model
        *([] if report.cores is None else _core_rows(report.cores)),
        *([] if report.vllm is None else _vllm_rows(report.vllm)),
        *([] if report.onnx is None else _onnx_rows(report.onnx)),
        *report.verdicts.items(),
    ]


def show_next_steps(report: FolderReport, console: Console) -> None:
    """Print the commands that take a folder further."""
    if report.next_steps:
        print_line(console, "Next:")
    for step in report.next_steps:
        print_line(console, f"  {step.what}:")
        print_line(console, f"    {step.command}")


def _run_rows(run: RunFacts) -> Rows:
    step = "" if run.checkpoint_step is None else f", with a checkpoint at step {run.checkpoint_step}"
    yield "state", run.state + (step if run.result is None else "")
    if run.failure is not None:
        yield f"failure ({run.failure.kind})", run.failure.message
    if run.result is not None:
        yield from run.result.facts().items()
    else:
        for name, value in (("method", run.method), ("base model", run.model), ("training data", run.data)):
            if value is not None:
                yield name, value
    if run.last_loss is not None:
        yield "training loss", f"{run.last_loss:.4f} (last in the log)"


def _adapter_rows(adapter: AdapterFacts) -> Rows:
    yield "base model", adapter.base_model or "not named"
    ranks = ", ".join(map(str, adapter.ranks)) or "unknown"
    yield "adapter", ", ".join([adapter.kind, *adapter.variants, f"rank {ranks}, alpha {adapter.lora_alpha:g}"])
    yield "targets", f"{', '.join(adapter.targets)} ({adapter.modules} modules)"
    yield "parameters", f"{adapter.parameters:,} ({', '.join(adapter.dtypes)})"


def _core_rows(cores: CoreFacts) -> Rows:
    yield "decomposition", cores.decomposition
    yield "matrices with cores", f"{cores.sites}"
    total = "" if cores.steps is None else f" of {cores.steps}"
    yield "steps", f"{cores.step}{total}"
    yield "optimizer", cores.optimizer or "no state"


def _vllm_rows(vllm: VllmFacts) -> Rows:
    yield "served model", vllm.served_model
    yield "rules of vLLM", vllm.vllm_version
    if vllm.max_lora_rank is not None:
        yield "--max-lora-rank", f"{vllm.max_lora_rank}"


def _onnx_rows(onnx: OnnxFacts) -> Rows:
    yield "base model", onnx.base_model
    yield "graph", f"{onnx.mode}, {onnx.precision}"
    yield "adapters", ", ".join(onnx.adapters)
    yield "check", onnx.verdict


def show_installation(found: Installation, request: DoctorRequest, console: Console) -> None:
    """Print what this installation has, what is missing, and how to get it."""
    rows: list[tuple[str, str]] = [("python", found.python)]
    rows += [("device", device.describe()) for device in found.devices]
    rows += [(f"  {name}", version or "missing") for name, version in found.libraries.items()]
    complete = [extra.name for extra in found.extras if not extra.missing]
    rows += [("extras complete", ", ".join(complete))] if complete else []
    for extra in found.extras:
        if extra.missing:
            rows.append((f"extra {extra.name}", f"missing {', '.join(extra.missing)}: {extra.install}"))
    rows += [("hub", found.hub), ("HumanEval sandbox", found.sandbox)]
    for engine in found.engines:
        state = f"not installed: {engine.install}" if engine.version is None else engine.version
        rows.append((engine.name, f"{state}; takes {engine.takes}" if engine.takes else state))
    rows += [("engines", fault) for fault in found.faults]
    print_rows(console, rows, wraps=True)
