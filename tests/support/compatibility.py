"""Rows that tests record about what was exported, served and compared, and their table, `docs/compatibility.md`.

`make compatibility` names a file in LORAOVER_COMPATIBILITY, runs the tests and renders the file. Without the variable,
tests record nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from loraover.common.atomic_output import publish_text

VARIABLE = "LORAOVER_COMPATIBILITY"
READ_NOT_RUN = Path(__file__).with_name("read_not_run.md")
"""The page's section on engines that cannot run here, kept by hand."""

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-genai", "llama-cpp-py-sync")

INTRODUCTION = """# Compatibility

Which models were exported and run in which engine. `make compatibility` writes this page from what the tests ran, on a
CPU; nothing here was run on a GPU. All families but SmolLM2 are tiny random models. Engines that cannot run here are
[below](#read-not-run). `loraover export check` says what each engine would do with your adapter.

The largest error is that of any logit against the unfolded PyTorch model, unless the mode says otherwise. The bound
comes from noise that was measured in the same run ([error bounds](error-bounds.md)). *Failed* means that the command
refused the combination, or that its check rejected the result; nothing was written.
"""

ARCHITECTURES = {
    "SmolLM2-135M-Instruct": "LlamaForCausalLM",
    "GPT-2": "GPT2LMHeadModel",
    "T5": "T5ForConditionalGeneration",
    "BERT": "BertForSequenceClassification",
}
"""Model classes of families; others are `<family>ForCausalLM`."""


@dataclass(frozen=True)
class Row:
    """One combination that was tried.

    Args:
        family: name of the model family.
        engine: name of the engine, with its version if it has a separate environment.
        mode: how the adapter was given to the engine.
        precision: data type of the weights.
        verdict: result of the check.
        error: largest deviation of a logit or logprob from PyTorch; None if there was nothing to compare.
        bound: largest deviation that the check allows.
    """

    family: str
    engine: str
    mode: str
    precision: str
    verdict: str
    error: float | None
    bound: float | None

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.family, f"{self.family}ForCausalLM")


def record(
    family: str, engine: str, mode: str, precision: str, verdict: str, error: float | None, bound: float | None
) -> None:
    """Append a row to the file that LORAOVER_COMPATIBILITY names; the arguments are `Row`'s."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path, row = Path(name), Row(family, engine, mode, precision, verdict, error, bound)
    with path.with_suffix(".lock").open("w") as lock:  # parallel workers record in one file
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*(read_rows(path) if path.exists() else []), row]
        publish_text(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())]


def table(rows: Sequence[Row]) -> str:
    """Return the page in Markdown; a later row replaces an earlier one of the same combination."""
    last = {(row.family, row.engine, row.mode, row.precision): row for row in rows}
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        INTRODUCTION,
        f"Versions: {versions}.",
        "",
        "| family | architecture | engine | mode | precision | largest error | bound | verdict |",
        "| --- | --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for _, row in sorted(last.items()):
        names = [row.family, f"`{row.architecture}`", row.engine, row.mode, row.precision]
        lines.append(f"| {' | '.join([*names, _number(row.error), _number(row.bound), row.verdict])} |")
    return "\n".join([*lines, READ_NOT_RUN.read_text(encoding="utf-8").rstrip()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    print(table(read_rows(Path(sys.argv[1]))))
