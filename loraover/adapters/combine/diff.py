"""How far two adapters are apart: by their deltas, by the spaces that these act between, and by their logits."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from loraover.adapters.combine.requests import DiffRequest
from loraover.adapters.combine.sources import Sources, deltas_of, read_sources
from loraover.adapters.numerics.delta import Delta, check_no_bias
from loraover.adapters.numerics.low_rank import (
    SingularValues,
    concatenate,
    decompose,
    factor_noise,
    principal_angles,
    product_norm,
)
from loraover.adapters.prompts import Prompts, logits_of, read_prompts, walked
from loraover.adapters.uniform.refusals import check_fields, written_parameters
from loraover.adapters.verdict import Deviation, RunningDeviation
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.peft_adapter import saved_labels
from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, hardware
from loraover.common.strict_json import StrictModel
from loraover.common.threads import workers
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.reference import reference_model
from loraover.sources.verb import verb


class ModuleDiff(StrictModel):
    """Comparison of the deltas of one module."""

    module: str = Field(description="Path of the module in the base model")
    ranks: tuple[int, int] = Field(description="Numerical rank of each delta; 0 if it is zero or missing")
    norms: tuple[float, float] = Field(description="Frobenius norm of each delta; 0 if it is missing")
    difference: float = Field(description="Frobenius norm of the difference of the deltas")
    column_angles: list[float] = Field(
        description="Principal angles between the column spaces of the deltas, in degrees, the smallest first; empty "
        "if one of them is zero or missing"
    )
    row_angles: list[float] = Field(
        description="Principal angles between the row spaces of the deltas, in degrees, the smallest first"
    )

    @property
    def relative_difference(self) -> float:
        """Norm of the difference over the larger norm of the two deltas; 0 if both are zero."""
        return self.difference / (max(self.norms) or 1.0)


class LogitDiff(StrictModel):
    """Comparison of the logits of two adapters on the base model."""

    base: str = Field(description="Base model that was run, in words")
    device: str = Field(description="Device that it ran on")
    compute_dtype: str = Field(description="Data type that it ran in: fp32, bf16, fp16 or fp64")
    tokens: int = Field(description="Number of tokens in all prompts")
    prompt_source: str = Field(description="Where the prompts come from, in words")
    difference: Deviation = Field(description="Distance of the second adapter's logits from the first one's")
    effects: tuple[Deviation, Deviation] = Field(
        description="Distance of the base model's logits from those of each adapter"
    )


class DiffReport(StrictModel):
    """Comparison of two adapters."""

    schema_version: int = 1
    first: str = Field(description="Folder of the first adapter")
    second: str = Field(description="Folder of the second adapter")
    base_model: str | None = Field(description="Base model that the adapters name; None if they name none")
    norms: tuple[float, float] = Field(description="Frobenius norm of all deltas of each adapter together")
    difference: float = Field(description="Frobenius norm of the differences of all deltas together")
    modules: list[ModuleDiff] = Field(description="One entry for each module that either adapter has a delta for")
    other_tensors: list[str] = Field(
        description="Parameters that the adapters hold in full, and that differ or that only one of them has"
    )
    logits: LogitDiff | None = Field(description="Comparison of the logits; None if it was not asked for")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")

    exit_code: ClassVar[int] = 0
    """Exit code of the command, which has no verdict."""

    @property
    def relative_difference(self) -> float:
        """Norm of all differences over the larger norm of the two adapters; 0 if both are zero."""
        return self.difference / (max(self.norms) or 1.0)


COMPARED = {"bias", "modules_to_save", "trainable_token_indices"}
"""Fields of parameters that are compared, besides those of A and B."""


@verb(DiffRequest)
def diff_adapters(request: DiffRequest) -> DiffReport:
    """Compare two adapters of one base model, module by module, from their factors.

    A and B are not unique, so the comparison is between the deltas scaling * B @ A: their norms, the norm of their
    difference, and the principal angles between their column spaces (what the module's output gains) and their row
    spaces (the inputs that they react to).

    Raises:
        ConfigError: Arguments that cannot be used, a base model that cannot be loaded, or adapters of different tasks
            with `logits`.
        CheckpointError: An adapter that cannot be trusted, or that holds NaN.
        ExportError: Adapters of different base models.
        DataError: A file of prompts that cannot be used.
    """
    sources = read_sources([request.first, request.second])
    for adapter in sources.adapters:
        check_no_bias(adapter)
        check_fields(adapter, "compare their logits in PEFT", allowed=COMPARED | written_parameters(adapter))
    compare = None
    if request.logits:
        tasks = {task for adapter in sources.adapters if (task := adapter.config.task_type) is not None}
        if len(tasks) > 1:
            raise ConfigError(
                f"{request.named('logits')}: the adapters were trained for different tasks "
                f"({', '.join(sorted(tasks))}), whose logits cannot be compared; leave it out."
            )
        base = resolve_base(sources.adapters, request.model, option=request.named("model"), say=request.report.line)
        compare = partial(compare_logits, request, sources, base, read_prompts(base, request.prompts))
    with (
        sources.opened() as opened,
        workers() as threads,
        request.report.task("comparing modules", len(sources.modules)) as done,
    ):
        modules: list[ModuleDiff] = []
        for module in threads.map(lambda path: compare_deltas(path, *deltas_of(opened, path)), sources.modules):
            modules.append(module)
            done(len(modules))
        one, other = ({name: key for key, name in exact.adapter.others.items()} for exact in opened)
        differing = [
            name
            for name in one.keys() & other.keys()
            if not torch.equal(opened[0].plain.read(one[name]).double(), opened[1].plain.read(other[name]).double())
        ]
    return DiffReport(
        first=request.shown("first"),
        second=request.shown("second"),
        base_model=sources.base_model,
        norms=(math.hypot(*(m.norms[0] for m in modules)), math.hypot(*(m.norms[1] for m in modules))),
        difference=math.hypot(*(m.difference for m in modules)),
        modules=modules,
        other_tensors=sorted([*differing, *(one.keys() ^ other.keys())]),
        logits=None if compare is None else compare(),
        versions=environment(),
        hardware=hardware(),
    )


def compare_logits(request: DiffRequest, sources: Sources, base: ModelSource, prompts: Prompts) -> LogitDiff:
    """Run the base model and two adapters on it; cores are applied as they are, and PEFT runs plain adapters."""
    place, dtype = str(choose_compute(request.device, request.compute_dtype)[0]), request.compute_dtype
    request.report.line(f"loading the base model from {base.origin} to {place}, {dtype}")
    labels = next(filter(None, (saved_labels(adapter.shapes) for adapter in sources.adapters)), None)
    plain = load_model(base, dtype=dtype, task_type=sources.task_type, num_labels=labels, device=place)
    difference, effects = RunningDeviation(), (RunningDeviation(), RunningDeviation())
    with (
        ExitStack() as stack,
        walked(prompts, plain, "the base model and both adapters", request.report) as steps,
    ):
        models = [stack.enter_context(reference_model(plain, adapter)) for adapter in sources.adapters]
        for ids, positions in steps:
            expected = logits_of(plain, ids, positions)
            found = [logits_of(model, ids, positions) for model in models]
            for effect, logits in zip(effects, found, strict=True):
                effect.add(logits, expected)
            difference.add(found[0], found[1])
    return LogitDiff(
        base=base.origin,
        device=place,
        compute_dtype=dtype,
        tokens=prompts.tokens,
        prompt_source=prompts.source,
        difference=difference.result(),
        effects=(effects[0].result(), effects[1].result()),
    )


def compare_deltas(module: str, first: Delta | None, second: Delta | None) -> ModuleDiff:
    """Compare the deltas of one module; None stands for an adapter that does not adapt it."""
    one, other = _decomposed(first), _decomposed(second)
    signed = [(delta, sign) for delta, sign in ((first, 1), (second, -1)) if delta is not None]
    factors = [(sign * delta.b.value.double(), delta.a.value.double()) for delta, sign in signed]
    columns: list[float] = []
    rows: list[float] = []
    if one is not None and other is not None:
        columns = principal_angles(*(svd.columns(rank) for svd, rank in (one, other)))
        rows = principal_angles(*(svd.rows(rank) for svd, rank in (one, other)))
    return ModuleDiff(
        module=module,
        ranks=(0 if one is None else one[1], 0 if other is None else other[1]),
        norms=(0.0 if one is None else one[0].norm, 0.0 if other is None else other[0].norm),
        difference=product_norm(*concatenate(factors)),
        column_angles=[math.degrees(angle) for angle in columns],
        row_angles=[math.degrees(angle) for angle in rows],
    )


def _decomposed(delta: Delta | None) -> tuple[SingularValues, int] | None:
    """Return a delta's singular value decomposition, and the rank up to which it is more than rounding."""
    if delta is None:
        return None
    svd = decompose(delta.b.value.double(), delta.a.value.double())
    return svd, svd.numerical_rank(factor_noise(delta.b, delta.a))
