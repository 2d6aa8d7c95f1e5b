"""ONNX Runtime on the written graphs against PyTorch's unfolded model."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraover.adapter_dir import AdapterDir
from loraover.checkpoint import Checkpoint
from loraover.unfolded import unfolded
from loraover_export.onnx.kind import Case, Kind, Run
from loraover_export.onnx.report import CaseError, GraphCheck, Greedy

GENERATED = 16  # tokens


@dataclass(frozen=True)
class Reference:
    """PyTorch's answers, in float32 and without ever forming A or B.

    Args:
        logits: (positions, vocabulary) for each case.
        noise: largest deviation of the same in another precision; None where PyTorch has no such precision.
        greedy: tokens after `prompt` and the logits before each, and before the end of the text if it came.
    """

    logits: list[Tensor]
    noise: float | None
    noise_of: str
    prompt: Tensor
    greedy: tuple[Tensor, Tensor] | None


@torch.no_grad()
def make_reference(
    kind: Kind, model: Any, source: Checkpoint | AdapterDir | None, cases: list[Case], precision: str
) -> Reference:
    """Run the unfolded model, or the base model where `source` is None.

    The noise is what rounding alone does: float32 against float64 (transformers keeps its norms in float32),
    or float16 against float32.
    """

    def run(model: Any) -> list[Tensor]:
        with nullcontext(model) if source is None else unfolded(model, source) as whole:
            return [kind.compared(case, kind.reference(whole, case)) for case in cases]

    logits = run(model)
    prompt = cases[0].ids[:1]
    with nullcontext(model) if source is None else unfolded(model, source) as whole:
        greedy = kind.generate_reference(whole, prompt, GENERATED)
    noise, noise_of = None, "int4 rounding of the base model"
    if precision == "fp32":
        noise, noise_of = largest(logits, run(model.double())), "PyTorch in float32 against float64"
        model.float()  # exact: its weights were float32
    elif precision == "fp16":
        noise, noise_of = largest(logits, run(copy.deepcopy(model).half())), "PyTorch in float16 against float32"
    return Reference(logits, noise, noise_of, prompt, greedy)


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two lists of logits."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


def run_cases(kind: Kind, run: Run, cases: list[Case]) -> list[Tensor]:
    """The engine's logits, padding left out."""
    return [kind.compared(case, run(case)) for case in cases]


def check_graph(
    kind: Kind,
    folder: Path,
    device: str,
    adapter: Path | None,
    cases: list[Case],
    reference: Reference,
    base: Reference,
    quantised: list[Tensor] | None,
) -> GraphCheck:
    """Compare one adapter's outputs, or the base model's, at every shape.

    Args:
        adapter: its files without their endings; None for the graph as it is.
        reference: what it must give.
        base: what the base model gives.
        quantised: for int4, the engine's logits of the base model, whose error is the noise.
    """
    found = run_cases(kind, kind.runner(folder, device, adapter), cases)
    errors = [(a.double() - b.double()).abs() for a, b in zip(reference.logits, found, strict=True)]
    noise = reference.noise
    if noise is None:
        noise = largest(base.logits, found if quantised is None else quantised)
    return GraphCheck(
        adapter=None if adapter is None else adapter.name,
        cases=[
            CaseError(case=case.name, max_logit=float(error.max()), mean_logit=float(error.mean()))
            for case, error in zip(cases, errors, strict=True)
        ],
        noise=noise,
        noise_of=reference.noise_of,
        adapter_effect=largest(base.logits, reference.logits),
        greedy=_greedy(kind, folder, device, adapter, reference),
    )


def _greedy(kind: Kind, folder: Path, device: str, adapter: Path | None, reference: Reference) -> Greedy | None:
    generated = kind.generate(folder, reference.prompt, GENERATED, device, adapter)
    if reference.greedy is None or generated is None:
        return None
    tokens, logits = reference.greedy
    expected, found = tokens.tolist(), generated.tolist()
    for i, row in enumerate(logits):
        if expected[i : i + 1] != found[i : i + 1]:
            other = row[found[i]] if i < len(found) else row.min()  # it ended the text, PyTorch did not
            return Greedy(tokens=len(logits), first_difference=i, gap=float(row.max() - other))
    return Greedy(tokens=len(logits), first_difference=None, gap=None)
