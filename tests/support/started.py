"""Models that start from trained adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loraover.common.reporter import SILENT, Reporter
from loraover.models.load import load_model, resolve_model
from loraover.training.launch.settings import with_adapter
from loraover.training.recipe import load_recipe
from loraover.training.run_result import StartedFrom
from loraover.training.start import start_from_adapter

from support.conversions import load_base
from support.tiny_hub import write_recipe
from support.tiny_models import with_lora


def adapter(base: Path, folder: Path, seed: int = 1, **lora: Any) -> Path:
    """A plain LoRA of rank 4 on all linear layers, unless told otherwise; returns its folder."""
    model = with_lora(load_base(base), seed=seed, task_type="CAUSAL_LM", **lora)
    model.save_pretrained(folder)
    return folder


def started(
    base: Path, output: Path, start: Any, report: Reporter = SILENT, **lora: Any
) -> tuple[PeftModel, StartedFrom]:
    """The model of a recipe whose `lora` has these keys, as a run starts it."""
    output.mkdir(exist_ok=True)
    named = start if isinstance(start, Mapping) else list(map(str, start)) if isinstance(start, list) else str(start)
    recipe = load_recipe(write_recipe(output / "asked.yaml", base, lora={"start_from": named, **lora}))
    source = resolve_model(str(base))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = with_adapter(load_model(source), recipe, "CAUSAL_LM", source)
    found = start_from_adapter(model, recipe, source, output, report)
    assert found is not None
    return model, found
