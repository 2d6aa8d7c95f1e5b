"""Count false alarms of the judge of vectors on right servers, whose noise is recorded and resampled.

    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR record URL NAME BASE REFERENCE ENGINE
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR round ADAPTER MODEL bf16
    cd tests && ../.venv/bin/python -m benchmarks.vector_alarms --work DIR judge ENGINE --resamples 10000

`record` asks a real server that is right for the vectors of a reference, and keeps how far both models are off; `round`
lets PyTorch compute in a number format, and its engine has the name of that. `judge`
draws as many of these errors with replacement, both models' of one text together, with a sign by chance, and judges the
right vectors with them. In further resamples the adapter is left out, to show what would be found.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.source import read_source
from loraover.client.endpoint import Endpoint
from loraover.models.load import load_tokenizer, resolve_model
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.asking import VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.vector_models import VectorRunner, read_reading
from loraover_serve.verify.vector_recorder import VectorRecording, read_texts

from support.drawn_vectors import answered

PLANTED = 20
"""Resamples of right servers for each one that serves the base model."""


def errors_of(reference: VectorReference, asker: VectorAsker) -> dict[str, list[list[float]]]:
    """How far the answers of both models to each text are off."""
    answers = asker.answers(1, without_mixed=True)
    found = {BASE: answers.base, ADAPTER: answers.adapter}
    return {
        arm: [
            (np.array(said.numbers) - np.array(reference.answer(reference.rows[arm][place]))).tolist()
            for place, said in sorted(each.items())
        ]
        for arm, each in found.items()
    }


def count_alarms(
    reference: VectorReference, errors: dict[str, Any], resamples: int, served_format: str = "bf16", seed: int = 0
) -> dict[str, Counter[str]]:
    """Verdicts on resampled answers of right servers, and of servers that leave the adapter out.

    Args:
        errors: Errors of both models, as `errors_of` returns them.
    """
    draw = np.random.default_rng(seed)
    right = {arm: np.array([reference.answer(row) for row in reference.rows[arm]]) for arm in (BASE, ADAPTER)}
    off = {arm: np.array(errors[arm]) for arm in right}
    found: dict[str, Counter[str]] = {"right": Counter(), "base": Counter()}
    for number in range(resamples):
        chosen, signs = (
            draw.integers(len(off[BASE]), size=len(right[BASE])),
            draw.choice([-1, 1], (len(right[BASE]), 1)),
        )
        noise = {arm: signs * off[arm][chosen] for arm in right}
        base = right[BASE] + noise[BASE]
        found["right"][_verdict(reference, base, right[ADAPTER] + noise[ADAPTER], served_format)] += 1
        if number % PLANTED == 0:
            found["base"][_verdict(reference, base, right[BASE] + noise[ADAPTER], served_format)] += 1
    return found


def _verdict(reference: VectorReference, base: Any, adapter: Any, served_format: str) -> str:
    return str(judge_vectors(reference, answered(base, adapter), served_format)["verdict"])


def read_vectors(path: Path) -> VectorReference:
    """A reference of vectors."""
    found = read_any_reference(path)
    assert isinstance(found, VectorReference)
    return found


@click.group()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for recorded errors.")
@click.pass_context
def main(context: click.Context, work: Path) -> None:
    """Record errors of right servers, and judge resamples of them."""
    work.mkdir(exist_ok=True, parents=True)
    context.obj = work.resolve()


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
    request = RecordRequest(adapter, model=model, device="cpu", force=True)
    source, base = read_source(adapter), resolve_model(model)
    reading = read_reading(base, "embed", None, None, None)
    texts, runner = read_texts(request, is_pair=False), VectorRunner(source, base, "embed", "cpu", "fp32")
    recording = VectorRecording(runner, load_tokenizer(base), reading, texts)
    reference = read_vectors(adapter / REFERENCE_FILE)
    errors = {
        arm: [
            (np.array(reference.answer(row.tolist())) - np.array(reference.answer(right))).tolist()
            for row, right in zip(rows, reference.rows[arm], strict=False)
        ]
        for arm, rows in recording.rounded(number_format, "fp32").items()
    }
    kept = {"reference": str((adapter / REFERENCE_FILE).resolve()), "errors": errors}
    (work / f"{number_format}.json").write_text(json.dumps(kept))


@main.command()
@click.argument("engine")
@click.option("--resamples", type=int, default=10_000, help="Number of resamples.")
@click.option("--served-format", default="bf16", help="Coarsest number format that is expected.")
@click.pass_obj
def judge(work: Path, engine: str, resamples: int, served_format: str) -> None:
    """Judge resamples, and print the verdicts."""
    kept = json.loads((work / f"{engine}.json").read_text())
    found = count_alarms(read_vectors(Path(kept["reference"])), kept["errors"], resamples, served_format)
    for server, verdicts in found.items():
        click.echo(f"{engine}, {server}: {dict(verdicts)}")


if __name__ == "__main__":
    main()
