"""Comparison of the written graphs in ONNX Runtime with PyTorch, also where PyTorch rounds as an int4 graph does."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.adapters.verdict import differences, largest
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.models.device import WITHOUT_FLOAT64
from loraover.reference import reference_model
from loraover_export.formats.onnx.kinds.base import ComparedTokens, GraphKind, GraphRunner
from loraover_export.formats.onnx.report import CaseError, GraphCheck, GreedyCheck
from loraover_export.merge.arithmetic import merge

GENERATED = 16  # tokens
CPU = torch.device("cpu")

BLOCK = 32  # neighbouring elements of a row that share a scale
WEIGHT_LEVELS, ACTIVATION_LEVELS = 8, 127  # largest magnitudes of 4 and 8 bits


@dataclass(frozen=True)
class OnnxReference:
    """PyTorch's outputs, on the CPU, of PEFT's model, or of the unfolded model if there are cores.

    Args:
        logits: Logits of each case, (positions, vocabulary).
        noise: Largest difference of these logits from those in another precision.
        noise_of: One or two comparisons by which the noise was measured, in words.
        rounded: Logits of a model that rounds as an int4 graph does; None for other precisions.
        prompt: Token ids that greedy decoding starts from, (1, tokens).
        greedy: Tokens after `prompt`, and the logits before each of them and before the end of the text if it came.
    """

    logits: list[Tensor]
    noise: float
    noise_of: str
    rounded: list[Tensor] | None
    prompt: Tensor
    greedy: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Compute:
    """Device and data type that PyTorch computes a reference in; None keeps the model's type."""

    device: torch.device
    dtype: torch.dtype | None


IN_FLOAT32 = Compute(CPU, torch.float32)


@torch.no_grad()
def make_reference(
    kind: GraphKind,
    model: Any,
    adapter: AdapterDir | None,
    cases: list[ComparedTokens],
    precision: str,
    *,
    merged: bool = False,
    compute: Compute = IN_FLOAT32,
) -> OnnxReference:
    """Run the adapted model in PyTorch, or the base model if `adapter` is None.

    The noise is the effect of rounding alone: float32 against float64 (transformers keeps its norms in float32),
    float16 against float32, or weights and activations rounded as in an int4 graph. Where PyTorch computes in bfloat16
    or float16, it is at least that type's effect, against float32.

    Args:
        kind: The kind of model.
        model: The base model in float32, on the CPU; it is left as it was.
        cases: Tokens to run.
        precision: Precision of the weights: fp32, fp16 or int4.
        merged: Whether the graph's weights, which int4 rounds, include the adapter.
        compute: Where and in which type to compute.
    """
    run = partial(_run, kind, cases)
    logits = run(model, adapter, compute)
    prompt = cases[0].ids[:1]
    with _adapted(model, adapter, compute) as adapted:
        greedy = kind.generate_reference(adapted, prompt.to(compute.device), GENERATED)
    single, rounded = replace(compute, dtype=torch.float32), None
    if precision == "fp32":
        in_float32 = run(model, adapter, single, torch.float32)
        double = Compute(CPU if compute.device.type in WITHOUT_FLOAT64 else compute.device, torch.float64)
        noise, noise_of = _finite_noise(in_float32, run(model, adapter, double)), "PyTorch in float32 against float64"
    elif precision == "int4":
        rounded = run(rounded_copy(model, adapter if merged else None), None if merged else adapter, compute)
        noise, noise_of = largest(logits, rounded), "PyTorch with weights in 4 bits and activations in 8"
    else:
        half = run(copy.deepcopy(model).half(), adapter, replace(compute, dtype=None))
        exact = logits if compute.dtype == torch.float32 else run(model, adapter, single)
        noise, noise_of = largest(exact, half), "PyTorch in float16 against float32"
    if compute.dtype in (torch.bfloat16, torch.float16):
        coarse = largest(run(model, adapter, single), logits)
        if coarse > noise:
            noise, noise_of = coarse, f"PyTorch in {str(compute.dtype).removeprefix('torch.')} against float32"
    if greedy is not None:
        greedy = greedy[0].cpu(), greedy[1].cpu()
    return OnnxReference(logits, noise, noise_of, rounded, prompt, greedy)


def _run(
    kind: GraphKind,
    cases: list[ComparedTokens],
    model: Any,
    adapter: AdapterDir | None,
    compute: Compute,
    delta_dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Logits of each case, on the CPU and without padding."""
    placed = [replace(case, ids=case.ids.to(compute.device)) for case in cases]
    with _adapted(model, adapter, compute, delta_dtype) as adapted:
        return [kind.compared(case, kind.reference(adapted, case)).cpu() for case in placed]


@contextmanager
def _adapted(
    model: Any,
    adapter: AdapterDir | None,
    compute: Compute,
    delta_dtype: torch.dtype = torch.float64,
) -> Iterator[Any]:
    """The adapted model where and in the type that it is to compute in; the base model if `adapter` is None."""
    with _converted(model, compute) as working:
        if adapter is None:
            yield working
            return
        with reference_model(working, adapter, delta_dtype=delta_dtype) as adapted:
            yield adapted


@contextmanager
def _converted(model: Any, compute: Compute) -> Iterator[Any]:
    """A model of the same weights in another type or on another device; a wider type on the CPU takes no copy."""
    dtype = compute.dtype or model.dtype
    if compute.device == CPU and dtype == model.dtype:
        yield model
    elif compute.device == CPU and dtype == torch.float64:
        try:
            yield model.double()
        finally:
            model.float()  # exact: its weights were float32
    else:
        parameters = {id(p): nn.Parameter(p.to(compute.device, dtype), requires_grad=False) for p in model.parameters()}
        buffers = {id(buffer): buffer.to(compute.device, copy=True) for buffer in model.buffers()}
        yield copy.deepcopy(model, {**parameters, **buffers})


def _finite_noise(in_float32: list[Tensor], in_float64: list[Tensor]) -> float:
    """Return the largest absolute difference, NaN left out, which can only lower the allowed error.

    Where attention is eager, transformers computes its softmax in float32, in which the float64 mask of a padded row is
    minus infinity: padding gives NaN, and so does every token that looks at it with weight 0.
    """
    found = torch.cat([difference.abs().flatten() for difference in differences(in_float32, in_float64)])
    finite = found[found.isfinite()]
    return float(finite.max()) if finite.numel() else math.nan


def run_cases(kind: GraphKind, run: GraphRunner, cases: list[ComparedTokens]) -> list[Tensor]:
    """Return the engine's logits of each case, without padding."""
    return [kind.compared(case, run(case)) for case in cases]


def check_graph(
    kind: GraphKind,
    folder: Path,
    device: str,
    adapter: Path | None,
    cases: list[ComparedTokens],
    reference: OnnxReference,
    base: OnnxReference,
    found_base: list[Tensor] | None,
) -> list[GraphCheck]:
    """Compare a graph's outputs with PyTorch's at every shape.

    In an int4 graph, the rounding of the base weights moves logits by as much as an adapter may, and would hide that
    the adapter is missing. Most of that error is the same without the adapter, so the change that the adapter makes is
    compared as well.
    """
    found = run_cases(kind, kind.runner(folder, device, adapter), cases)
    effect = largest(base.logits, reference.logits)
    logits = GraphCheck(
        adapter=None if adapter is None else adapter.name,
        compared=kind.compared_as,
        cases=_errors(cases, reference.logits, found),
        noise=reference.noise,
        noise_of=reference.noise_of,
        adapter_effect=effect,
        greedy=_greedy(kind, folder, device, adapter, reference),
    )
    if found_base is None or reference.rounded is None or base.rounded is None:
        return [logits]
    expected = differences(reference.logits, base.logits)
    change = GraphCheck(
        adapter=logits.adapter,
        compared="change",
        cases=_errors(cases, expected, differences(found, found_base)),
        noise=largest(expected, differences(reference.rounded, base.rounded)),
        noise_of=reference.noise_of,
        adapter_effect=effect,
        greedy=None,
    )
    return [logits, change]


def _errors(cases: list[ComparedTokens], expected: list[Tensor], found: list[Tensor]) -> list[CaseError]:
    errors = [error.abs() for error in differences(expected, found)]
    return [
        CaseError(case=case.name, max_logit=float(error.max()), mean_logit=float(error.mean()))
        for case, error in zip(cases, errors, strict=True)
    ]


def _greedy(
    kind: GraphKind, folder: Path, device: str, adapter: Path | None, reference: OnnxReference
) -> GreedyCheck | None:
    generated = kind.generate(folder, reference.prompt, GENERATED, device, adapter)
    if reference.greedy is None or generated is None:
        return None
    tokens, logits = reference.greedy
    expected, found = tokens.tolist(), generated.tolist()
    for i, row in enumerate(logits):
        if expected[i : i + 1] != found[i : i + 1]:
            other = row[found[i]] if i < len(found) else row.min()  # the engine ended the text, PyTorch did not
            return GreedyCheck(tokens=len(logits), first_difference=i, gap=float(row.max() - other))
    return GreedyCheck(tokens=len(logits), first_difference=None, gap=None)


@torch.no_grad()
def rounded_copy(model: Any, merged: AdapterDir | None) -> Any:
    """Return a copy of the model that rounds as onnxruntime-genai's int4 graphs for a CPU do.

    In every linear layer, blocks of 32 weights are rounded to 4 bits and blocks of 32 activations to 8 bits, with a
    scale for each block. On a 2-layer Llama with either kind of graph, ONNX Runtime's logits differ from PyTorch's by
    as much as those of this copy, within 10 %.

    Source: ONNX Runtime 1.32, contrib operator MatMulNBits with symmetric blocks and accuracy level 4.
    """
    rounded = copy.deepcopy(model)
    if merged is not None:
        merge(rounded, merged)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(round_weights(module.weight), requires_grad=False)
            module.register_forward_pre_hook(lambda module, args: (round_activations(args[0]), *args[1:]))
    return rounded


def round_weights(weights: Tensor) -> Tensor:
    """Round each block of weights (out, in) to -8 ... 7 times a scale; its largest element becomes -8 times that."""
    blocks = _blocks(weights)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = _without_zero(-largest / WEIGHT_LEVELS)
    levels = (blocks / scale).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS - 1)
    return (levels * scale).flatten(-2)[..., : weights.shape[-1]].contiguous()


def round_activations(x: Tensor) -> Tensor:
    """Round each block of activations (..., in) to -127 ... 127 times a scale."""
    blocks = _blocks(x)
    scale = _without_zero(blocks.abs().amax(-1, keepdim=True) / ACTIVATION_LEVELS)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    """Reshape (..., in) to (..., blocks, BLOCK), padded with zeros."""
    return nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).reshape(*x.shape[:-1], -1, BLOCK)


def _without_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
