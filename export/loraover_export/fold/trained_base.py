"""How far an adapter's outputs move when it is served on another precision of the base model than it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.reporter import SILENT, Reporter
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_config, load_model
from loraover.reference.reference_model import reference_model
from loraover_export.fold.certificate import TrainedBase
from loraover_export.logits.deviation import RunningDeviation
from loraover_export.logits.pieces import logits_of, pieces, tokens_at_once
from loraover_export.logits.prompts import read_prompts


def compare_bases(
    folded: Path,
    source: ModelSource,
    quantization: str,
    prompts_file: Path | None,
    report: Reporter = SILENT,
    *,
    device: str = "cpu",
    compute_dtype: str = "fp32",
) -> TrainedBase:
    """Run a plain adapter on the full base model and on the quantised one, and compare every logit.

    Args:
        folded: Folder of the adapter.
        source: The base model in full precision.
        quantization: How `loraover train` had it quantised: nf4 or int8 of bitsandbytes.
        prompts_file: Text file with one prompt a line; None means a built-in set.
        report: Receiver of progress.
        device: Device to run on: cpu, cuda, auto, or one GPU such as cuda:1.
        compute_dtype: Data type to run in.

    Raises:
        ConfigError: bitsandbytes is missing, or cannot quantise this model here.
    """
    adapter, device = read_adapter_dir(folded), str(choose_compute(device, compute_dtype)[0])
    config = load_config(source)
    prompts = read_prompts(source, prompts_file, at_once=tokens_at_once(config, torch.device(device)))
    from peft import PeftModel

    report.line(f"loading the base model in full precision and as {quantization} to {device}")
    full = load_model(source, dtype=compute_dtype, task_type=adapter.config.task_type, device=device)
    small = load_model(source, dtype=compute_dtype, device=device, quantization=quantization)
    small = PeftModel.from_pretrained(small, str(folded)).eval()
    difference, bases = RunningDeviation(), RunningDeviation()
    with reference_model(full, adapter) as over_full:
        for ids in prompts.batches:
            given = ids.to(full.device)
            for positions in pieces(full, ids):
                difference.add(logits_of(over_full, given, positions), logits_of(small, given, positions))
                with small.disable_adapter():
                    bases.add(logits_of(full, given, positions), logits_of(small, given, positions))
    return TrainedBase(
        quantization=quantization, served=source.origin, difference=difference.result(), bases=bases.result()
    )
