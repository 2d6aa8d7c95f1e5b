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

Look up here which adapters each engine serves as they were trained, and which models were exported and run.
`make test-engines` writes this page from what the tests ran, on a CPU; nothing here was run on a GPU. Engines that
cannot run here are [below](#read-not-run). `loraover check` says what each engine would do with your adapter.

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

![Each engine with each kind of adapter, in PEFT's form and in ours: right, wrong or refused.](figures/matrix.svg)

{forms}

`loraover check`, which runs nothing, has to give the same verdict for each cell. It judges the answers for the
adapter only, so the cells in which vLLM applies an adapter to the base model's rows are not compared.

The reasons, in the engine's words or verify's:

{reasons}

## vLLM with the plug-in

A tiny random Llama in float32, served with `--max-lora-rank 16`. The stock server gets each adapter's folder by its
route `/v1/load_lora_adapter`. With [the plug-in](how-to/serve-any-adapter.md), a request names the adapter. The number
is the HTTP status. The distance is the root mean square of the difference of logprobs from PyTorch's with the adapter
as it was trained; where the adapter is damaged, there is nothing to compare with.

{plugin}

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
_MEASURED = re.compile("; |, so that |, and no known fault ")


@dataclass(frozen=True)
class Cell:
    """One engine with one kind of adapter in one form.

    Args:
        engine: Name of the engine, as verify takes it.
        version: Its version; None if it reports none, or refused before it did.
        form: Form in which the adapter was given to the engine.
        feature: The kind of adapter.
        verdict: "as trained", "refused", "wrong silently" or "inconclusive".
        reason: The verdict's reason, or the message of the refusal.
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
        family: Name of the model family.
        engine: Name of the engine, with its version if it has a separate environment.
        mode: How the adapter was given to the engine.
        precision: Data type of the weights.
        verdict: Result of the check.
        error: Largest deviation of a logit or logprob from PyTorch; None if there was nothing to compare.
        bound: Largest deviation that the check allows.
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


@dataclass(frozen=True)
class PluginRow:
    """One adapter on a vLLM server, with our plug-in or without.

    Args:
        adapter: Name of the adapter in `support.plugin`.
        server: "stock" or "plug-in".
        status: HTTP status of the stock server's load route, or of a request for the adapter's name.
        verdict: "as trained", "refused" or "wrong silently".
        nats: Distance of the answers from PyTorch's; None if there are none to compare.
    """

    adapter: str
    server: str
    status: int
    verdict: str
    nats: float | None


Entry = Row | Cell | PluginRow


def record_row(row: PluginRow) -> None:
    """Append a row of the plug-in's table to the file that LORAOVER_COMPATIBILITY names."""
    _append(row)


def record(
    family: str, engine: str, mode: str, precision: str, verdict: str, error: float | None, bound: float | None
) -> None:
    """Append a row to the file that LORAOVER_COMPATIBILITY names; the arguments are `Row`'s."""
    _append(Row(family, engine, mode, precision, verdict, error, bound))


def record_cell(cell: Cell) -> None:
    """Append a cell to the file that LORAOVER_COMPATIBILITY names."""
    _append(cell)


def _append(entry: Entry) -> None:
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path = Path(name)
    with path.with_suffix(".lock").open("w") as lock:  # parallel workers record in one file
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = [*(read_entries(path) if path.exists() else []), entry]
        publish_text(path, json.dumps([asdict(each) for each in entries], indent=1) + "\n")


def read_entries(path: Path) -> list[Entry]:
    kinds = {"form": Cell, "server": PluginRow}
    return [
        next((kind for field, kind in kinds.items() if field in entry), Row)(**entry)
        for entry in json.loads(path.read_text())
    ]


def page(entries: Sequence[Entry]) -> str:
    """Return the page in Markdown; a later entry replaces an earlier one of the same combination."""
    cells = {(e.engine, e.form, e.feature): e for e in entries if isinstance(e, Cell)}
    introduction = INTRODUCTION.format(
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        forms="\n".join(_forms(list(cells.values()))),
        reasons="\n".join(_reasons(list(cells.values()))),
        plugin="\n".join(_plugin([entry for entry in entries if isinstance(entry, PluginRow)])),
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


PLUGIN_ROWS = {
    "plain": "plain LoRA",
    "rslora": "rsLoRA with a rank pattern",
    "loha": "LoHa",
    "lokr": "LoKr",
    "lokr-64": "LoKr of rank 64, above the server's",
    "vera": "VeRA",
    "pissa": "PiSSA",
    "checkpoint": "LoRA-Over checkpoint",
    "misplaced": "LoRA with another family's prefix",
    "dora": "DoRA",
    "high": "configuration has another rank",
    "truncated": "truncated file",
    "narrow": "A of another width",
}
"""Rows of the plug-in's table, in words."""


def _plugin(rows: Sequence[PluginRow]) -> Iterator[str]:
    """The plug-in's table: a line for each adapter, and two columns for each server."""
    yield "| adapter | stock vLLM | nats | with the plug-in | nats |"
    yield "| --- | --- | ---: | --- | ---: |"
    found = {(row.adapter, row.server): row for row in rows}
    for name, words in PLUGIN_ROWS.items():
        both = [found.get((name, server)) for server in ("stock", "plug-in")]
        cells = [("-", "-") if row is None else (f"{row.verdict}, {row.status}", _number(row.nats)) for row in both]
        yield f"| {words} | {' | '.join(cell for pair in cells for cell in pair)} |"


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
    """A reason without its measurements and the folders of the test, and not longer than a few lines."""
    known = _MEASURED.split(reason, maxsplit=1)[0]
    text = " ".join(_PATH.sub("", known).split()).replace("|", "\\|")
    return text if len(text) <= REASON_SHOWN else f"{text[:REASON_SHOWN].rpartition(' ')[0]} ..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    print(page(read_entries(Path(sys.argv[1]))))
