"""Logits of a converted adapter against those of its source, both as PEFT loads them from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_model
from loraover.reporting.reporter import Reporter
from loraover_export.convert.report import OutputsOfConversion
from loraover_export.fold.check_outputs import logits_of, pieces, tokens_at_once
from loraover_export.fold.deviation import RunningDeviation
from loraover_export.fold.prompts import read_prompts


def compare_outputs(
    source: Path,
    converted: Path,
    base: ModelSource,
    task_type: str | None,
    prompts_file: Path | None,
    report: Reporter,
    *,
    device: str,
    compute_dtype: str,
) -> OutputsOfConversion:
    """Run the source and the converted adapter on the same prompts, and compare every logit.

    Each has a base model in memory, since some kinds of adapters change the base weights when PEFT loads them.

    Args:
        source: folder of the source.
        converted: folder of the written adapter.
        base: the base model.
        task_type: PEFT's name of the task; None means CAUSAL_LM.
        prompts_file: text file with one prompt a line; None means a built-in set.
        report: receiver of progress.
        device: device to run on.
        compute_dtype: data type to run in: fp32, bf16, fp16 or fp64.

    Raises:
        ConfigError: a base model that cannot be loaded, or a device that is not there.
        DataError: no usable prompt in the file.
    """
    place, _ = choose_compute(device, compute_dtype)
    report.line(f"loading the base model from {base.origin} twice, to {place}, {compute_dtype}")
    trained, written = (_load(base, folder, task_type, compute_dtype, str(place)) for folder in (source, converted))
    prompts = read_prompts(base, prompts_file, at_once=tokens_at_once(written.get_base_model()))
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


def _load(base: ModelSource, folder: Path, task_type: str | None, dtype: str, device: str) -> Any:
    from peft import PeftModel

    model = load_model(base, dtype=dtype, task_type=task_type, device=device)
    return PeftModel.from_pretrained(model, str(folder), torch_device=device).eval()
