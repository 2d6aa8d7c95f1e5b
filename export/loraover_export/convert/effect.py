"""Logits of a converted adapter against those of its source, both as PEFT loads them from their folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from loraover.checkpoint.peft_adapter import CONFIG_FILE
from loraover.common.errors import ConfigError
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.overparam.expert_part import without_base_layers
from loraover.reporting.reporter import Reporter
from loraover_export.convert.report import OutputsOfConversion
from loraover_export.convert.source import Layout
from loraover_export.fold.check_outputs import logits_of, pieces
from loraover_export.fold.deviation import RunningDeviation
from loraover_export.fold.prompts import Prompts


def compare_outputs(
    source: Layout[Any],
    converted: Path,
    base: ModelSource,
    prompts: Prompts,
    report: Reporter,
    *,
    num_labels: int | None,
    device: str,
    compute_dtype: str,
) -> OutputsOfConversion:
    """Run the source and the converted adapter on the same prompts, and compare every logit.

    Each has a base model in memory, since some kinds of adapters change the base weights when PEFT loads them.

    Args:
        source: the source.
        converted: folder of the written adapter.
        base: the base model.
        prompts: token ids to run.
        report: receiver of progress.
        num_labels: number of labels of a classification head that the source replaces; None if it replaces none.
        device: device to run on.
        compute_dtype: data type to run in: fp32, bf16, fp16 or fp64.

    Raises:
        ConfigError: a base model that cannot be loaded for the source's task, or a device that is not there.
    """
    place, _ = choose_compute(device, compute_dtype)
    report.line(f"loading the base model from {base.origin} twice, to {place}, {compute_dtype}")
    load = partial(_load, base, source, num_labels, compute_dtype, str(place))
    trained, written = load(source.path), load(converted)
    error, effect = RunningDeviation(), RunningDeviation()
    tokens, seen = sum(batch.numel() for batch in prompts.batches), 0
    with report.task(f"running the source and the LoRA on {prompts.source}, tokens", tokens) as done:
        for ids in prompts.batches:
            placed = ids.to(place)
            for positions in pieces(written.get_base_model(), ids):
                expected = logits_of(trained, placed, positions)
                error.add(expected, logits_of(written, placed, positions))
                with written.disable_adapter():
                    effect.add(expected, logits_of(written, placed, positions))
            seen += ids.numel()
            done(seen)
    return OutputsOfConversion(
        base=base.origin,
        device=str(place),
        compute_dtype=compute_dtype,
        tokens=tokens,
        prompt_source=prompts.source,
        error=error.result(),
        adapter_effect=effect.result().max_logit,
    )


def _load(base: ModelSource, source: Layout[Any], num_labels: int | None, dtype: str, device: str, folder: Path) -> Any:
    from peft import PeftModel

    task = source.config.task_type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # transformers draws a head that the base model lacks: the same one both times
        model = load_model(base, dtype=dtype, task_type=task, num_labels=num_labels, device=device)
    lost = {without_base_layers(path) for path in source.modules} - dict(model.named_modules()).keys()
    if lost:
        raise ConfigError(
            f"{source.path / CONFIG_FILE}: task_type is {task!r}, for which the base model is loaded as a "
            f"{type(model).__name__}, and that has no module {min(lost)}. Write the adapter's task there, or leave out "
            "--check-error."
        )
    return PeftModel.from_pretrained(model, str(folder), torch_device=device).eval()
