"""The logits of two adapters on their base model, on the same prompts."""

from __future__ import annotations

from contextlib import ExitStack

from loraover.checkpoint.peft_adapter import saved_labels
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.reference.reference_model import reference_model
from loraover_export.combine.diff_report import LogitDiff
from loraover_export.combine.requests import DiffRequest
from loraover_export.combine.sources import Sources
from loraover_export.logits.deviation import RunningDeviation
from loraover_export.logits.pieces import logits_of, walked
from loraover_export.logits.prompts import Prompts


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
