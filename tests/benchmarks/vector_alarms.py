"""Count false alarms of the judge of vectors, classes and scores on right servers, whose noise is resampled.

    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR alarms --resamples 10000
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR record URL NAME BASE REFERENCE ENGINE
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR round ADAPTER MODEL bf16
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR judge ENGINE --resamples 10000
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR write

`alarms` makes a tiny model of vectors, one of classes and one of scores, lets PyTorch round them to each number format,
and judges resamples of that. `record` asks a real server that is right for the vectors of a reference, and keeps how
far both models are off, alone and in mixed batches; `round` lets PyTorch compute in a number format, and its engine has
the name of that; `judge` judges resamples of either; `write` puts all counts into the table of docs/verify.md.

A resample draws as many errors with replacement, both models' of one text together, with a sign by chance. Rounded
weights move an answer alike whenever it is asked for, and rounded arithmetic anew each time: answers in mixed batches
differ from those alone by what was recorded, or else by errors that are drawn anew for each number. In further
resamples the adapter is left out, or a text is answered by the other model in mixed batches, to show what would be
found. Counts are kept in the folder after every hundred resamples, and a later run goes on from there.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.source import read_source
from loraover.client.endpoint import Endpoint
from loraover.common.atomic_output import publish_text
from loraover.models.load import resolve_model
from loraover_serve import record_adapter
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.asking import VectorAnswer, VectorAnswers, VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.vector_recorder import load_recording

from benchmarks.page import replaced
from support.drawn_vectors import answered
from support.vector_server import SHOP, save_encoder, save_vector_adapter

PLANTED = 20
"""Resamples of right servers for each one with a fault."""
AT_ONCE = 100
"""Resamples after which counts are kept."""
ARITHMETIC = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}
"""Formats in which a server may hold its weights, and the format in which it then computes."""
FP32 = 1e-6
"""RMS error of a number that is computed in float32, as a share of a vector's RMS number."""
AS_MUCH = 0.5
"""Size of the errors of arithmetic, as a share of those of weights in the same format."""
CAPTION = (
    "Of vectors, classes and scores, `python -m benchmarks.vector_alarms` counts verdicts on drawn answers of right "
    "and of faulty servers. Models are tiny, and their noise is that of PyTorch with rounded weights, or was recorded "
    "on vLLM for CPUs; requests are sent alone and in mixed batches. Faults: the base model answers in the adapter's "
    "place, and a quarter of the answers in mixed batches are the other model's."
)
PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
TASKS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "vectors": ("FEATURE_EXTRACTION", (), True),
    "classes": ("SEQ_CLS", ("good", "bad", "odd"), False),
    "scores": ("SEQ_CLS", ("relevant",), True),
}
"""Adapter's task, labels, and whether the model is a decoder."""

Numbers = NDArray[np.float64]
Errors = Mapping[str, Any]


class Noise(NamedTuple):
    """Errors of a right server.

    Args:
        off: Errors of each arm's answers, (texts, numbers); those named "mixed ..." are of answers in mixed batches,
            and are counted from those alone.
        anew: RMS error that is drawn anew for each number of each answer.
    """

    off: Errors
    anew: float = 0.0


def errors_of(reference: VectorReference, asker: VectorAsker) -> dict[str, list[list[float]]]:
    """How far the answers of both models to each text are off, and how far mixed batches move them."""
    answers = asker.answers(1)
    alone = {BASE: answers.base, ADAPTER: answers.adapter}
    found = {
        arm: [
            (np.array(said.numbers) - np.array(reference.answer(reference.rows[arm][place]))).tolist()
            for place, said in sorted(each.items())
        ]
        for arm, each in alone.items()
    }
    return found | {
        f"mixed {arm}": [
            (np.array(said.numbers) - np.array(alone[arm][place].numbers)).tolist()
            for place, said in sorted(each.items())
        ]
        for arm, each in answers.mixed.items()
    }


class Drawn:
    """Answers of right and of faulty servers, drawn by chance.

    Args:
        noise: Errors of a right server.
        draw: Source of chance.
    """

    def __init__(self, reference: VectorReference, noise: Noise, draw: np.random.Generator) -> None:
        self._reference, self._noise, self._draw = reference, noise, draw
        self._right = {arm: np.array([reference.answer(row) for row in reference.rows[arm]]) for arm in (BASE, ADAPTER)}
        self._off = {name: np.array(each) for name, each in noise.off.items()}

    def answers(self, fault: str = "") -> VectorAnswers:
        """Answers of a server that is right, serves the adapter "as base", or "leaks" in mixed batches."""
        right = dict(self._right)
        texts = len(right[BASE])
        chosen, signs = self._draw.integers(len(self._off[BASE]), size=texts), self._draw.choice([-1, 1], (texts, 1))
        if fault == "as base":
            right[ADAPTER] = right[BASE]
        moved = {arm: right[arm] + signs * self._off[arm][chosen] for arm in right}
        alone = {arm: self._anew(rows) for arm, rows in moved.items()}
        mixed = {}
        for arm, rows in moved.items():
            own = self._off.get(f"mixed {arm}")
            mixed[arm] = self._anew(rows) if own is None else alone[arm] + signs * own[chosen]
        if fault == "leaks":
            at = self._draw.permutation(texts) < texts // 4
            mixed[BASE][at] = self._anew(moved[ADAPTER])[at]
        each = {arm: {at: VectorAnswer(row.tolist()) for at, row in enumerate(rows)} for arm, rows in mixed.items()}
        return replace(answered(alone[BASE], alone[ADAPTER]), mixed=each)

    def _anew(self, rows: Numbers) -> Numbers:
        found = rows + self._noise.anew * self._draw.standard_normal(rows.shape)
        if self._reference.task != "embed":
            return np.array([self._reference.centred(row.tolist()) for row in found])
        return np.asarray(found)


def count_alarms(
    reference: VectorReference, noise: Noise, resamples: int, served_format: str = "bf16", seed: int = 0
) -> dict[str, Counter[str]]:
    """Verdicts on resampled answers of right servers, and of servers with a fault."""
    drawn = Drawn(reference, noise, np.random.default_rng(seed))
    found: dict[str, Counter[str]] = {"right": Counter(), "as base": Counter(), "leaks": Counter()}
    for number in range(resamples):
        for server in found if number % PLANTED == 0 else ("right",):
            answers = drawn.answers("" if server == "right" else server)
            judged = judge_vectors(reference, answers, served_format)
            found[server][f"{judged['verdict']} {judged['fault'] or ''}".strip()] += 1
    return found


class Kept:
    """Counts of resamples in a file, a line for each hundred; the numbers of these are the seeds.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self._lines = [json.loads(line) for line in lines if line.endswith("}")]

    def count(self, name: str, reference: VectorReference, noise: Noise, resamples: int, served_format: str) -> float:
        """Judge the resamples that are missing, and return the seconds that one took; 0 if none is missing."""
        known = {line["part"] for line in self._lines if line["name"] == name}
        parts = [part for part in range(-(-resamples // AT_ONCE)) if part not in known]
        start = time.perf_counter()
        for part in parts:
            found = count_alarms(reference, noise, AT_ONCE, served_format, part)
            self._lines.append({"name": name, "part": part, "found": found})
            with self._file.open("a") as file:
                file.write(json.dumps(self._lines[-1]) + "\n")
        return (time.perf_counter() - start) / (AT_ONCE * len(parts)) if parts else 0.0

    def totals(self) -> dict[str, dict[str, Counter[str]]]:
        """Verdicts on each server of each name, over all parts."""
        total: dict[str, dict[str, Counter[str]]] = {}
        for line in self._lines:
            servers = total.setdefault(line["name"], {})
            for server, counts in line["found"].items():
                servers.setdefault(server, Counter()).update(counts)
        return total

    def shown(self, name: str) -> Iterator[str]:
        """Lines with the counts of false alarms, of verdicts and of the faults that were found."""
        for server, counts in self.totals()[name].items():
            alarms, everything = alarms_of(counts)
            told = f"{alarms} of {everything} " + ("false alarms" if server == "right" else "found")
            yield f"{name}, {server}: {told}; {dict(counts.most_common())}"


def alarms_of(verdicts: Counter[str]) -> tuple[int, int]:
    """The number of verdicts that are alarms, and of all."""
    return sum(n for verdict, n in verdicts.items() if verdict.startswith("differs")), verdicts.total()


def read_vectors(path: Path) -> VectorReference:
    """A reference of vectors."""
    found = read_any_reference(path)
    assert isinstance(found, VectorReference)
    return found


def rounded_errors(adapter: Path, model: str, number_format: str) -> dict[str, list[list[float]]]:
    """How far both models are off in a number format, in PyTorch, on the texts of the adapter's reference."""
    request = RecordRequest(adapter, model=model, device="cpu", force=True)
    recording = load_recording(request, read_source(adapter), resolve_model(model))
    recording.right()
    reference = read_vectors(adapter / REFERENCE_FILE)
    return {
        arm: [
            (np.array(reference.answer(row.tolist())) - np.array(reference.answer(right))).tolist()
            for row, right in zip(rows, reference.rows[arm], strict=False)
        ]
        for arm, rows in recording.rounded(number_format, "fp32").items()
    }


def made(work: Path, name: str) -> tuple[VectorReference, dict[str, Noise]]:
    """A tiny model of a task with its reference, and the errors in each number format; made at the first time."""
    task, labels, is_decoder = TASKS[name]
    folder = work / name
    file = folder / "errors.json"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        base = save_encoder(folder, task, labels, decoder=is_decoder)
        targets: dict[str, Any] = (
            {} if task == "FEATURE_EXTRACTION" else {"target_modules": ["q_proj", "v_proj", "query", "value"]}
        )
        adapter = save_vector_adapter(base, folder / SHOP, task, **targets)
        record_adapter(adapter, model=str(base), device="cpu", force=True)
        kept = {each: rounded_errors(adapter, str(base), each) for each in ("bf16", "int8")}
        file.write_text(json.dumps(kept))
    reference, kept = read_vectors(folder / SHOP / REFERENCE_FILE), json.loads(file.read_text())
    size = float(
        np.sqrt(np.mean(np.square(np.concatenate([np.ravel(reference.rows[arm]) for arm in (BASE, ADAPTER)]))))
    )
    size = size if reference.task != "embed" else 1 / np.sqrt(reference.numbers)
    noises = {}
    for held, computed in ARITHMETIC.items():
        none = {arm: [[0.0] * len(row) for row in reference.rows[arm]] for arm in (BASE, ADAPTER)}
        anew = FP32 if computed == "fp32" else AS_MUCH * reference.formats[computed]["distance"]
        noises[held] = Noise(kept.get(held, none), float(anew * size))
    return reference, noises


@click.group()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for recorded errors.")
@click.pass_context
def main(context: click.Context, work: Path) -> None:
    """Record errors of right servers, and judge resamples of them."""
    torch.set_num_threads(1)
    work.mkdir(exist_ok=True, parents=True)
    context.obj = work.resolve()


@main.command()
@click.option("--resamples", type=int, default=10_000, help="Number of resamples of each task and format.")
@click.pass_obj
def alarms(work: Path, resamples: int) -> None:
    """Judge resamples of tiny models of every task in every number format."""
    kept = Kept(work / "alarms.jsonl")
    for task in TASKS:
        reference, noises = made(work, task)
        for held, noise in noises.items():
            name = f"{task} in {held}"
            seconds = kept.count(name, reference, noise, resamples, "int8" if held == "int8" else "bf16")
            for line in kept.shown(name):
                click.echo(line)
            click.echo(f"{name}: {1000 * seconds:.1f} ms a resample")


@main.command()
@click.argument("url")
@click.argument("name")
@click.argument("base")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("engine")
@click.pass_obj
def record(work: Path, url: str, name: str, base: str, reference: Path, engine: str) -> None:
    """Ask a real server, and keep how far it is off."""
    read = read_vectors(reference)
    errors = errors_of(read, VectorAsker.of(read, Endpoint(url), name, base))
    kept = {"reference": str(reference.resolve()), "errors": errors}
    (work / f"{engine}.json").write_text(json.dumps(kept))


@main.command("round")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("model")
@click.argument("number_format", type=click.Choice(list(FORMATS)))
@click.pass_obj
def round_(work: Path, adapter: Path, model: str, number_format: str) -> None:
    """Run both models in a number format, and keep how far they are off."""
    reference = adapter / REFERENCE_FILE
    errors = rounded_errors(adapter, model, number_format)
    (work / f"{number_format}.json").write_text(json.dumps({"reference": str(reference.resolve()), "errors": errors}))


@main.command()
@click.argument("engine")
@click.option("--resamples", type=int, default=10_000, help="Number of resamples.")
@click.option("--served-format", default="bf16", help="Coarsest number format that is expected.")
@click.pass_obj
def judge(work: Path, engine: str, resamples: int, served_format: str) -> None:
    """Judge resamples, and print the verdicts."""
    found, kept = json.loads((work / f"{engine}.json").read_text()), Kept(work / "judged.jsonl")
    kept.count(engine, read_vectors(Path(found["reference"])), Noise(found["errors"]), resamples, served_format)
    for line in kept.shown(engine):
        click.echo(line)


@main.command()
@click.pass_obj
def write(work: Path) -> None:
    """Write the table of all counts into docs/verify.md."""
    lines = ["| answers of | false alarms | inconclusive | base model found | mixed batches found |"]
    lines.append(f"| --- {'| ---: ' * 4}|")
    for file in ("alarms.jsonl", "judged.jsonl"):
        for name, servers in Kept(work / file).totals().items():
            right = servers["right"]
            found = [alarms_of(servers[server]) for server in ("right", "as base", "leaks")]
            told = [f"{alarms:,} of {everything:,}" for alarms, everything in found]
            told.insert(1, f"{sum(n for verdict, n in right.items() if verdict.startswith('inconclusive')):,}")
            lines.append(f"| {' | '.join([name, *told])} |")
    text = "\n".join(["", CAPTION, "", *lines, ""])
    publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "vector_alarms", text, PAGE))


if __name__ == "__main__":
    main()
