"""How far two adapters are apart: by their deltas, by the spaces that these act between, and by their logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from loraover.adapters.combine.diff_report import DiffReport, LogitDiff, ModuleDiff
from loraover.adapters.combine.requests import DiffRequest
from loraover.adapters.combine.sources import Sources, deltas_of, read_sources
from loraover.adapters.logits.deviation import RunningDeviation
from loraover.adapters.logits.pieces import logits_of, walked
from loraover.adapters.logits.prompts import Prompts, read_prompts
from loraover.adapters.numerics.delta import Delta, check_no_bias
from loraover.adapters.numerics.low_rank import (
    SingularValues,
    concatenate,
    decompose,
    factor_noise,
    principal_angles,
    product_norm,
)
from loraover.adapters.uniform.refusals import check_fields, written_parameters
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.peft_adapter import ExactAdapter, saved_labels
from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, hardware
from loraover.common.threads import workers
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.reference.reference_model import reference_model
from loraover.sources.verb import verb

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
    compare = _comparison(request, sources) if request.logits else None
    with (
        sources.opened() as opened,
        workers() as threads,
        request.report.task("comparing modules", len(sources.modules)) as done,
    ):
        modules: list[ModuleDiff] = []
        for module in threads.map(partial(_compared, opened), sources.modules):
            modules.append(module)
            done(len(modules))
        others = _others(opened)
    return DiffReport(
        first=request.shown("first"),
        second=request.shown("second"),
        base_model=sources.base_model,
        norms=(math.hypot(*(m.norms[0] for m in modules)), math.hypot(*(m.norms[1] for m in modules))),
        difference=math.hypot(*(m.difference for m in modules)),
        modules=modules,
        other_tensors=others,
        logits=None if compare is None else compare(),
        versions=environment(),
        hardware=hardware(),
    )


def _comparison(request: DiffRequest, sources: Sources) -> Callable[[], LogitDiff]:
    """Read the prompts, and return the comparison of the adapters' logits.

    Raises:
        ConfigError: Adapters of different tasks.
    """
    tasks = {task for adapter in sources.adapters if (task := adapter.config.task_type) is not None}
    if len(tasks) > 1:
        raise ConfigError(
            f"{request.named('logits')}: the adapters were trained for different tasks ({', '.join(sorted(tasks))}), "
            "whose logits cannot be compared; leave it out."
        )
    base = resolve_base(sources.adapters, request.model, option=request.named("model"), say=request.report.line)
    return partial(compare_logits, request, sources, base, read_prompts(base, request.prompts))


def compare_logits(request: DiffRequest, sources: Sources, base: ModelSource, prompts: Prompts) -> LogitDiff:
    """Run the base model, then each of two adapters on it, on the same prompts one at a time.

    Cores are applied as they are, and PEFT runs plain adapters.

    Args:
        request: The arguments of the comparison.
        sources: The two adapters.
        base: The base model.
        prompts: Token ids to run.

    Raises:
        CheckpointError: The base model is not the one that an adapter was trained on.
        ConfigError: A base model that cannot be loaded, or a device that is not there.
    """
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


def _compared(opened: Sequence[ExactAdapter], module: str) -> ModuleDiff:
    first, second = deltas_of(opened, module)
    return compare_deltas(module, first, second)


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


def _others(opened: Sequence[ExactAdapter]) -> list[str]:
    """Return the names of parameters that the adapters hold in full, and that differ or that only one of them has."""
    one, other = ({name: key for key, name in exact.adapter.others.items()} for exact in opened)
    differing = [
        name
        for name in one.keys() & other.keys()
        if not torch.equal(opened[0].plain.read(one[name]).double(), opened[1].plain.read(other[name]).double())
    ]
    return sorted([*differing, *(one.keys() ^ other.keys())])
