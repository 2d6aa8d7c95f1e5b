"""Rows that tests record about what was exported, served and compared, and their table, `docs/compatibility.md`.

`make test-engines` names a file in LORAOVER_COMPATIBILITY, runs the tests and renders the file. Without the variable,
tests record nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from loraover.common.atomic_output import publish_text
from loraover_serve.engines import ENGINES

VARIABLE = "LORAOVER_COMPATIBILITY"
READ_NOT_RUN = Path(__file__).with_name("read_not_run.md")
"""The page's section on engines that cannot run here, kept by hand."""

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-genai", "llama-cpp-py-sync")

INTRODUCTION = """# Compatibility

Which adapters each engine serves as they were trained, and which models were exported and run. `make test-engines`
writes this page from what the tests ran, on a CPU; nothing here was run on a GPU. Engines that cannot run here are
[below](#read-not-run). `loraover export check` says what each engine would do with your adapter.

Versions: {versions}.

## Adapters in PEFT's form and in ours

*As trained*, *refused* (with a message) or *wrong silently* is the verdict of [verify](verify.md) on a tiny random
Llama in float32. The adapters have r = 4 and alpha = 6, so even the plain one has a scaling other than 1. PEFT's form
is what an engine's users give it without this package:

- `torch`, `vllm` and `mlx` get PEFT's folder, for mlx-lm under the file name that it looks for;
- `onnx` gets the graph that onnxruntime-genai's builder makes with PEFT's folder as its `adapter_path`;
- `llamacpp` gets the file that llama.cpp's own converter writes;
- `openvino` gets PEFT's tensors, with the alpha that OpenVINO GenAI takes where the program gives none.

Ours is what `loraover export` writes; an export that refuses counts as refused. A mixed batch has requests for the base
model and for the adapter; other engines than servers take one request at a time.

{forms}

`loraover export check`, which runs nothing, has to give the same verdict for each cell. It judges the answers for the
adapter only, so the cells in which vLLM applies an adapter to the base model's rows are not compared.

The reasons, in the engine's words or verify's:

{reasons}

## Model families

All families but SmolLM2 are tiny random models.

The largest error is that of any logit against the PyTorch reference, unless the mode says otherwise. The bound
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

FORMS = PEFT, OURS = "PEFT's", "ours"
"""Forms in which an engine can get an adapter."""
FEATURES = ("plain", "rsLoRA", "rank pattern", "alpha pattern", "embeddings", "tied head", "mixed batch")
"""Columns of the matrix: kinds of adapters, and batches with requests for the base model and the adapter."""
REASON_SHOWN = 300  # characters
_PATH = re.compile(r"(?<!\S)/[^\s:,]*/")


@dataclass(frozen=True)
class Cell:
    """One engine with one kind of adapter in one form.

    Args:
        engine: name of the engine, as verify takes it.
        version: its version; None if it reports none, or refused before it did.
        form: form in which the adapter was given to the engine.
        feature: the kind of adapter.
        verdict: "as trained", "refused", "wrong silently" or "inconclusive".
        reason: the verdict's reason, or the message of the refusal.
    """

    engine: str
    version: str | None
    form: str
    feature: str
    verdict: str
    reason: str


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
    _append(Row(family, engine, mode, precision, verdict, error, bound))


def record_cell(cell: Cell) -> None:
    """Append a cell to the file that LORAOVER_COMPATIBILITY names."""
    _append(cell)


def _append(entry: Row | Cell) -> None:
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path = Path(name)
    with path.with_suffix(".lock").open("w") as lock:  # parallel workers record in one file
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = [*(read_entries(path) if path.exists() else []), entry]
        publish_text(path, json.dumps([asdict(each) for each in entries], indent=1) + "\n")


def read_entries(path: Path) -> list[Row | Cell]:
    return [Cell(**entry) if "form" in entry else Row(**entry) for entry in json.loads(path.read_text())]


def page(entries: Sequence[Row | Cell]) -> str:
    """Return the page in Markdown; a later entry replaces an earlier one of the same combination."""
    cells = {(e.engine, e.form, e.feature): e for e in entries if isinstance(e, Cell)}
    introduction = INTRODUCTION.format(
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        forms="\n".join(_forms(list(cells.values()))),
        reasons="\n".join(_reasons(list(cells.values()))),
    )
    last = {(e.family, e.engine, e.mode, e.precision): e for e in entries if isinstance(e, Row)}
    lines = [
        introduction,
        "| family | architecture | engine | mode | precision | largest error | bound | verdict |",
        "| --- | --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for _, row in sorted(last.items()):
        names = [row.family, f"`{row.architecture}`", row.engine, row.mode, row.precision]
        lines.append(f"| {' | '.join([*names, _number(row.error), _number(row.bound), row.verdict])} |")
    return "\n".join([*lines, READ_NOT_RUN.read_text(encoding="utf-8").rstrip()])


def _forms(cells: Sequence[Cell]) -> Iterator[str]:
    """The matrix: a line for each engine and form, a column for each feature."""
    yield f"| engine | form | {' | '.join(FEATURES)} |"
    yield f"| --- | --- |{' --- |' * len(FEATURES)}"
    verdicts = {(cell.engine, cell.form, cell.feature): cell.verdict for cell in cells}
    versions = {cell.engine: cell.version for cell in cells if cell.version}
    for engine in sorted({cell.engine for cell in cells}):
        for form in FORMS:
            shown = [verdicts.get((engine, form, feature), "-") for feature in FEATURES]
            reader = " ".join(filter(None, [ENGINES[engine].title, versions.get(engine)]))
            yield f"| `{engine}`, {reader} | {form} | {' | '.join(shown)} |"


def _reasons(cells: Sequence[Cell]) -> Iterator[str]:
    """Why cells are not as trained; one line for all cells of an engine with the same reason."""
    features: dict[tuple[str, str, str, str], list[str]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.engine, FORMS.index(cell.form), FEATURES.index(cell.feature))):
        if cell.verdict != "as trained":
            features.setdefault((cell.engine, cell.form, cell.verdict, _shown(cell.reason)), []).append(cell.feature)
    for (engine, form, verdict, reason), found in features.items():
        yield f"- `{engine}`, {form}, {', '.join(found)}: *{verdict}*. {reason}"


def _shown(reason: str) -> str:
    """A reason without the folders of the test, and not longer than a few lines."""
    text = " ".join(_PATH.sub("", reason).split()).replace("|", "\\|")
    return text if len(text) <= REASON_SHOWN else f"{text[:REASON_SHOWN].rpartition(' ')[0]} ..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    print(page(read_entries(Path(sys.argv[1]))))
