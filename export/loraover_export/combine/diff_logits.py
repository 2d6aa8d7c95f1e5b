"""The logits of two adapters on their base model, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.reporter import SILENT, Reporter
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.reference.reference_model import reference_model
from loraover_export.combine.diff_report import LogitDiff
from loraover_export.logits.deviation import RunningDeviation
from loraover_export.logits.pieces import logits_of
from loraover_export.logits.prompts import Prompts


def compare_logits(
    adapters: Sequence[AdapterDir],
    source: ModelSource,
    prompts: Prompts,
    report: Reporter = SILENT,
    *,
    task_type: str | None = None,
    num_labels: int | None = None,
    device: str = "auto",
    compute_dtype: str = "fp32",
) -> LogitDiff:
    """Run the base model, then each of two adapters on it, on the same prompts one at a time.

    Args:
        adapters: The two adapters; cores are applied as they are, and PEFT runs plain adapters.
        source: The base model.
        prompts: Token ids to run.
        report: Receiver of progress.
        task_type: PEFT's name of the adapters' task; None means CAUSAL_LM.
        num_labels: Number of labels of a classification head that an adapter replaces; None if none does.
        device: Device to run on: cpu, cuda, mps, auto, or one GPU such as cuda:1.
        compute_dtype: Data type to run in: fp32, bf16, fp16 or fp64.

    Raises:
        CheckpointError: The base model is not the one that an adapter was trained on.
        ConfigError: A base model that cannot be loaded, or a device that is not there.
    """
    place, _ = choose_compute(device, compute_dtype)
    report.line(f"loading the base model from {source.origin} to {place}, {compute_dtype}")
    base = load_model(source, dtype=compute_dtype, task_type=task_type, num_labels=num_labels, device=str(place))
    difference, effects = RunningDeviation(), (RunningDeviation(), RunningDeviation())
    tokens = sum(ids.numel() for ids in prompts.batches)
    done = 0
    label = f"running the base model and both adapters on {prompts.source}, tokens"
    with ExitStack() as stack, report.task(label, tokens) as advance:
        models = [stack.enter_context(reference_model(base, adapter)) for adapter in adapters]
        for batch in prompts.batches:
            ids = batch.to(place)
            plain = logits_of(base, ids, None)
            found = [logits_of(model, ids, None) for model in models]
            for effect, logits in zip(effects, found, strict=True):
                effect.add(logits, plain)
            difference.add(found[0], found[1])
            done += ids.numel()
            advance(done)
    return LogitDiff(
        base=source.origin,
        device=str(place),
        compute_dtype=compute_dtype,
        tokens=tokens,
        prompt_source=prompts.source,
        difference=difference.result(),
        effects=(effects[0].result(), effects[1].result()),
    )
