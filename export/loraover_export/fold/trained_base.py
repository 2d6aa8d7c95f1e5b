"""How far an adapter's outputs move when it is served on another precision of the base model than it was trained on."""

from __future__ import annotations

from pathlib import Path

from loraover.adapters.logits.deviation import RunningDeviation
from loraover.adapters.logits.prompts import logits_of, read_prompts, tokens_at_once, walked
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.models.device import choose_compute
from loraover.models.load import ModelSource, load_config, load_model
from loraover.reference.reference_model import reference_model
from loraover_export.fold.certificate import TrainedBase
from loraover_export.requests import FoldRequest


def compare_bases(request: FoldRequest, folded: Path, source: ModelSource, quantization: str) -> TrainedBase:
    """Run a plain adapter on the full base model and on the quantised one, and compare every logit.

    Args:
        request: The arguments of the fold.
        folded: Folder of the adapter.
        source: The base model in full precision.
        quantization: How `loraover train` had it quantised: nf4 or int8 of bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is missing, or cannot quantise this model here.
    """
    adapter, compute_dtype = read_adapter_dir(folded), request.compute_dtype
    place, _ = choose_compute(request.device, compute_dtype)
    device, at_once = str(place), tokens_at_once(load_config(source), place)
    prompts = read_prompts(source, request.prompts, at_once=at_once)
    from peft import PeftModel

    request.report.line(f"loading the base model in full precision and as {quantization} to {device}")
    full = load_model(source, dtype=compute_dtype, task_type=adapter.config.task_type, device=device)
    small = load_model(source, dtype=compute_dtype, device=device, quantization=quantization)
    small = PeftModel.from_pretrained(small, str(folded)).eval()
    difference, bases = RunningDeviation(), RunningDeviation()
    with reference_model(full, adapter) as over_full, walked(prompts, full, "both bases", request.report) as steps:
        for ids, positions in steps:
            difference.add(logits_of(over_full, ids, positions), logits_of(small, ids, positions))
            with small.disable_adapter():
                bases.add(logits_of(full, ids, positions), logits_of(small, ids, positions))
    return TrainedBase(
        quantization=quantization, served=source.origin, difference=difference.result(), bases=bases.result()
    )
