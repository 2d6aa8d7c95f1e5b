"""Complete commands that may be run on a folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from loraover.inspection.report import FolderReport, NextStep
from loraover.training.run.folder import RECIPE_FILE


def next_steps(report: FolderReport) -> list[NextStep]:
    """List the commands that take a folder further.

    Args:
        report: Description of the folder.
    """
    path = Path(report.path)
    if report.kind == "run":
        return _of_run(report, path)
    if report.kind == "vLLM export":
        return [
            _step("Serve it with vLLM", "loraover", "serve", "up", str(path)),
            _step("Measure its cost", "loraover", "serve", "parity", "--adapter", str(path), "--engine", "vllm"),
        ]
    if report.kind == "ONNX export" or report.adapter is None:
        return []
    return _of_adapter(report, path)


def _of_run(report: FolderReport, path: Path) -> list[NextStep]:
    assert report.run is not None
    if report.run.state == "finished":
        compare = _step("Show its measures", "loraover", "compare", str(path))
        return [compare, *([] if report.adapter is None else _of_adapter(report, path / "adapter"))]
    if report.run.method is None:
        return []
    recipe = str(path / RECIPE_FILE)
    if not report.run.can_resume:
        return [_step("Start the run again", "loraover", "train", recipe, "-o", str(beside(path, "again")))]
    return [_step("Continue the run", "loraover", "train", recipe, "-o", str(path), "--resume")]


def _of_adapter(report: FolderReport, path: Path) -> list[NextStep]:
    assert report.adapter is not None
    steps = []
    if report.cores is not None:
        folded = str(beside(path, "folded"))
        fold = ("loraover", "export", "fold", str(path), "-o", folded, "--check-error")
        steps.append(_step("Fold the cores into a plain adapter, and compare outputs", *fold))
    if report.adapter.kind == "LORA" and "DoRA" not in report.adapter.variants:
        export = ("loraover", "export")
        steps += [
            _step("Write an adapter for vLLM", *export, "vllm", str(path), "-o", str(beside(path, "vllm"))),
            _step(
                "Write an ONNX graph with the adapter merged",
                *(*export, "onnx", str(path), "--mode", "merged", "-o", str(beside(path, "onnx"))),
            ),
        ]
    elif report.adapter.kind != "LORA":
        convert = ("loraover", "export", "convert", str(path), "-o", str(beside(path, "lora")))
        steps.append(_step("Make a plain LoRA of it, which engines read", *convert))
    if report.kind == "folded adapter":
        steps.append(_step("Measure its cost", "loraover", "serve", "parity", "--adapter", str(path)))
    if report.adapter.base_model is not None:
        ask = ("loraover", "eval", report.adapter.base_model, "--task", "gsm8k")
        steps.append(_step("Evaluate it", *ask, "--adapter", str(path), "--limit", "100"))
    return steps


def beside(path: Path, ending: str) -> Path:
    """Path of a new folder beside another one."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}-{ending}")


def _step(what: str, *words: str) -> NextStep:
    return NextStep(what=what, command=shlex.join(words))
